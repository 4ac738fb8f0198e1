"""What values a configuration may hold; every message names the key."""

import math
from collections.abc import Callable

from ml_collections import ConfigDict

from difflm_jax.checkpoint.names import PROJECTIONS
from difflm_jax.errors import UserError

PHASES = ("pretrain", "sft")

_CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "remat": ("full", "none"),
    "attention": ("full", "prefix"),
    "mask_rate": ("batch", "row"),
    "loss_tokens": ("all", "masked"),
    "loss_weight": ("uniform", "inverse_rate"),
    "answers": ("last", "all"),
    "overlong": ("cut", "drop"),
    "lr_schedule": ("linear", "cosine", "constant"),
    "lora_config.bias": ("none",),
    "wandb_config.mode": ("", "online", "offline", "disabled"),
}

# (what is allowed in words, the test, the keys it holds for)
_RANGES = (
    (
        "at least 1",
        lambda x: x >= 1,
        """epochs batch_size gradient_accumulation_steps log_interval log_frequency_per_epoch length_multiple
        loss_chunk keep_checkpoints diffusion_steps sample_tokens lora_config.r report.max_new_tokens""",
    ),
    ("at least 2", lambda x: x >= 2, "max_length"),
    (
        "at least 0",
        lambda x: 0 <= x < math.inf,
        """dataloader_num_workers answer_padding warmup_steps weight_decay max_steps eval_batches sample_prompts
        report.rows""",
    ),
    (
        "a number above 0",
        lambda x: 0 < x < math.inf,
        "learning_rate adam_eps max_grad_norm lora_config.lora_alpha",
    ),
    ("in [0, 1)", lambda x: 0 <= x < 1, "lora_config.lora_dropout adam_b1 adam_b2"),
    ("in (0, 1)", lambda x: 0 < x < 1, "test_size"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "min_mask_probability max_mask_probability"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "bad_row_budget"),
    ("in [0, 2^32)", lambda x: 0 <= x < 2**32, "seed"),
)

# A phase's own value obeys the rule of the common key.
_PHASE_NUMBERS = ("epochs", "learning_rate", "max_steps", "batch_size")


def validate(config: ConfigDict) -> None:
    """Raises `UserError` for the first value that no run can use."""
    for key, choices in _CHOICES.items():
        if config[key] not in choices:
            raise UserError(f"{key}={config[key]!r}: must be one of {', '.join(repr(choice) for choice in choices)}")
    for words, allowed, keys in _RANGES:
        for key in keys.split():
            _check_range(config, key, words, allowed)
            if key in _PHASE_NUMBERS:
                for phase in PHASES:
                    _check_range(config, f"{phase}.{key}", words, allowed)
    _check_lists(config)
    _check_texts(config)
    _check_combinations(config)


def without_effect(config: ConfigDict) -> list[str]:
    """Lines to announce: keys that are set, and accepted for the sake of old configurations, but change nothing."""
    lines = []
    if not config.pin_memory:
        lines.append("pin_memory=False has no effect: there is no pinned host memory to turn off here")
    return lines


def _check_range(config: ConfigDict, key: str, words: str, allowed: Callable[[float], bool]) -> None:
    value = config[key]
    if value is not None and not allowed(value):
        raise UserError(f"{key}={value!r}: must be {words}")


def _check_lists(config: ConfigDict) -> None:
    rules = (("phases", PHASES), ("lora_config.target_modules", tuple(PROJECTIONS)))
    for key, known in rules:
        values = config[key]
        if not values:
            raise UserError(f"{key}: is empty; choose of {', '.join(known)}")
        for value in values:
            if value not in known:
                raise UserError(f"{key}: unknown {value!r} (known: {', '.join(known)})")
        if len(set(values)) < len(values):
            raise UserError(f"{key}={','.join(values)}: names one twice")
    for passes in config.report.tokens_per_pass:
        if passes < 1:
            raise UserError(f"report.tokens_per_pass: {passes} must be at least 1")
    if config.report.data and not config.report.tokens_per_pass:
        raise UserError("report.tokens_per_pass: is empty; give at least one number, or set report.data to nothing")


def _check_texts(config: ConfigDict) -> None:
    for key in ("model", "output_dir"):
        if not config[key]:
            raise UserError(f"{key}: is empty")
    for phase in config.phases:
        own = config[phase]["dataset"]
        if not (config.dataset if own is None else own):
            raise UserError(
                f"{'dataset' if own is None else f'{phase}.dataset'}: is empty; the phase {phase} needs one"
            )


def _check_combinations(config: ConfigDict) -> None:
    low, high = config.min_mask_probability, config.max_mask_probability
    if low > high:
        raise UserError(f"min_mask_probability={low}: must not exceed max_mask_probability={high}")
    if config.answers == "all" and config.attention != "full":
        raise UserError(
            f"answers='all': needs attention='full'; under attention={config.attention!r} a row has one prompt and one "
            "answer, so set answers='last'"
        )
    if config.use_qlora or config.quantization:
        key = "use_qlora=True" if config.use_qlora else f"quantization={config.quantization!r}"
        raise UserError(
            f"{key}: 4-bit bases are not available in this version; set use_qlora=False and quantization='' "
            "(the base is then held in dtype)"
        )
