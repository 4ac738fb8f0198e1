"""Validation of a config: each value against its own setting, then the rules on several keys."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from difflm_jax.config.schema import KEYS, flatten
from difflm_jax.data.packing import PACKED
from difflm_jax.errors import UserError
from difflm_jax.quant import QuantConfig


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first key whose value is not allowed, alone or combined with another key's."""
    flat = flatten(config.to_dict())
    for name, key in KEYS.items():
        if flat.get(name) is not None:  # a loaded config has no aliases, and keys of a phase may be unset
            key.setting.check(name, flat[name])
    QuantConfig(config.quantization or "nf4", config.quantization_block_size)  # raises if they are invalid
    for broken, message in _rules(config):
        if broken:
            raise UserError(message)


def _rules(config: ConfigDict) -> Iterator[tuple[bool, str]]:
    """Yields (whether the rule is broken, message) for rules on several keys. A rule may rely on those before it."""
    lowest, highest = config.min_mask_probability, config.max_mask_probability
    attention, block_length, padding = config.attention, config.block_length, config.answer_padding
    yield lowest > highest, f"min_mask_probability={lowest} must not exceed max_mask_probability={highest}"
    yield (
        config.batching == "shared" and attention == "full",
        "batching='shared' needs attention='prefix' or 'block': under 'full' the beginning of a prompt depends on its "
        "rest; choose batching='packed'",
    )
    yield (
        config.row_examples > 0 and config.batching not in PACKED,
        f"row_examples={config.row_examples} is the width of packed rows: set batching='packed' or 'shared'",
    )
    yield (
        (attention == "block") != (block_length > 0),
        f"attention={attention!r} with block_length={block_length}: a block length belongs to attention='block', which "
        "needs one",
    )
    yield (
        config.mask_rate == "block" and attention != "block",
        f"mask_rate='block' needs attention='block', not {attention!r}",
    )
    yield (
        attention == "block" and padding % block_length > 0,
        f"answer_padding={padding} must be a multiple of block_length={block_length}",
    )
    yield (
        config.answers == "all" and attention != "full",
        f"answers='all' needs attention='full': under {attention!r} a row is one prompt and one answer",
    )
    yield from _objective_rules(config)
    if config.objective == "draft":
        yield from _draft_rules(config)
    if config.trained == "all":
        yield from _all_weights_rules(config)


def _objective_rules(config: ConfigDict) -> Iterator[tuple[bool, str]]:
    yield (
        config.on_policy and config.complementary_masks,
        "on_policy with complementary_masks: what the model leaves open has no complement; set one off",
    )
    yield (
        config.on_policy and config.answers == "all",
        "on_policy with answers='all': decoding fills one answer; set answers='last' or on_policy=0",
    )
    yield (
        config.on_policy_tokens == "own" and not (config.on_policy and config.distillation_weight),
        "on_policy_tokens='own' needs on_policy and distillation_weight above 0: only a teacher can judge the model's "
        "own tokens",
    )
    yield (
        config.block_growth_steps and config.attention != "block",
        f"block_growth_steps needs attention='block', not {config.attention!r}: blocks grow up to block_length",
    )
    yield (
        config.loss_weight == "context" and config.loss_tokens != "masked",
        "loss_weight='context' weighs hidden tokens: it needs loss_tokens='masked'",
    )


def _draft_rules(config: ConfigDict) -> Iterator[tuple[bool, str]]:
    yield config.phases != ("sft",), "objective='draft' trains on answers: set phases=sft"
    yield config.trained == "all", "objective='draft' needs trained='adapter': the base must stay as it is"
    yield config.train_mask_row, "objective='draft' needs train_mask_row=false: its noise is ordinary tokens"
    is_changed = config.attention != "full" or config.logit_shift
    yield is_changed, "objective='draft' is causal: leave attention and logit_shift"
    shares = (config.complementary_masks, config.on_policy, config.distillation_weight, config.anneal_steps)
    yield (
        any(shares),
        "objective='draft' hides no tokens: set what needs masks off",
    )


def _all_weights_rules(config: ConfigDict) -> Iterator[tuple[bool, str]]:
    yield config.quantization, "trained='all' with a quantised base: codes cannot be trained; set trained='adapter'"
    yield (
        config.adapter,
        f"trained='all' with adapter={config.adapter!r}: merge it first (python -m difflm_jax.export --to=merged), and "
        "name the result with model",
    )
    yield (
        config.distillation_weight,
        "distillation_weight needs trained='adapter': with 'all' there is no frozen base to teach",
    )
    yield not config.train_mask_row, "train_mask_row=false contradicts trained='all'"
