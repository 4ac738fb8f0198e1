"""What the values of a configuration must satisfy, as tables; types are the business of `difflm_jax.config.files`."""

import math
from typing import Any

from ml_collections import ConfigDict

from difflm_jax.data.packing import BATCHING
from difflm_jax.errors import UserError
from difflm_jax.models.transformer import REMAT
from difflm_jax.models.weights import PROJECTIONS
from difflm_jax.ops.attention_kernels import KERNELS
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.options import ALGORITHMS
from difflm_jax.utils.dtypes import AUTO, DTYPES

PHASES = ("pretrain", "sft")

_CHOICES = {
    "trained": ("adapter", "all"),
    "dtype": (AUTO, *DTYPES),
    "remat": tuple(REMAT),
    "attention": ("full", "prefix", "block"),
    "attention_kernel": tuple(KERNELS),
    "mask_rate": ("batch", "row", "block"),
    "batching": BATCHING,
    "loss_tokens": ("all", "masked"),
    "loss_weight": ("uniform", "inverse_rate", "context"),
    "loss_average": ("tokens", "answers"),
    "eos_loss": ("all", "first"),
    "on_policy_tokens": ("reference", "own"),
    "algorithm": ALGORITHMS,
    "answers": ("last", "all"),
    "overlong": ("cut", "drop"),
    "lr_schedule": ("linear", "cosine", "constant"),
    "lora_config.bias": ("none",),
    "wandb_config.mode": ("auto", "online", "offline", "disabled"),
}

# (what is said, the test, the keys)
_RANGES = (
    (
        "greater than 0",
        lambda x: x > 0,
        (
            "learning_rate", "epochs", "batch_size", "gradient_accumulation_steps", "log_interval",
            "log_frequency_per_epoch", "diffusion_steps", "length_multiple", "loss_chunk",
            "keep_checkpoints", "adam_eps", "lora_config.r", "lora_config.lora_alpha", "sample_tokens",
            "report.max_new_tokens", "max_nonfinite_steps", "profile.first_step",
            "on_policy_passes", "anneal_power",
        ),
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        (
            "dataloader_num_workers", "max_steps", "warmup_steps", "weight_decay", "max_grad_norm", "eval_rows",
            "sample_prompts", "answer_padding", "report.rows", "heartbeat_seconds", "profile.steps", "block_length",
            "distillation_weight", "anneal_steps", "block_growth_steps",
        ),
    ),
    ("2 or more", lambda x: x >= 2, ("max_length",)),
    ("in [0, 2^31)", lambda x: 0 <= x < 2**31, ("seed",)),
    ("in [0, 1)", lambda x: 0 <= x < 1, ("test_size", "lora_config.lora_dropout", "adam_b1", "adam_b2")),
    ("in [0, 1]", lambda x: 0 <= x <= 1, ("bad_row_budget", "on_policy")),
    ("in (0, 1]", lambda x: 0 < x <= 1, ("min_mask_probability", "max_mask_probability")),
    ("-1 (all devices) or greater than 0", lambda x: x == -1 or x > 0, ("mesh.data", "mesh.fsdp", "mesh.tensor")),
)  # fmt: skip

_NOT_EMPTY = ("model", "dataset", "output_dir")


def validate(config: ConfigDict) -> None:
    """Raises `UserError` that names the first key whose value is not allowed, alone or beside the others."""
    _check_each(config)
    _check_lists(config)
    _check_together(config)


def _check_each(config: ConfigDict) -> None:
    for key in _NOT_EMPTY:
        for name, value in _values(config, key):
            if not value:
                raise UserError(f"{name} must not be empty")
    for key, allowed in _CHOICES.items():
        for name, value in _values(config, key):
            if value not in allowed:
                raise UserError(f"{name} must be {_either(allowed)}, not {value!r}")
    for wording, holds, keys in _RANGES:
        for key in keys:
            for name, value in _values(config, key):
                if not math.isfinite(value) or not holds(value):
                    raise UserError(f"{name} must be {wording}, not {value!r}")


def _check_lists(config: ConfigDict) -> None:
    for key, known in (("phases", PHASES), ("lora_config.target_modules", tuple(PROJECTIONS))):
        ((_, values),) = _values(config, key)
        if not values:
            raise UserError(f"{key} must not be empty (known: {', '.join(known)})")
        if unknown := [value for value in values if value not in known]:
            raise UserError(f"{key}: {unknown[0]!r} is not known (known: {', '.join(known)})")
        if len(set(values)) != len(values):
            raise UserError(f"{key} names something twice: {', '.join(values)}")
    budgets = config.report.tokens_per_pass
    if not budgets or min(budgets) < 1:
        raise UserError(f"report.tokens_per_pass must be integers greater than 0, not {tuple(budgets)}")


def _check_together(config: ConfigDict) -> None:
    if config.min_mask_probability > config.max_mask_probability:
        raise UserError(
            f"min_mask_probability={config.min_mask_probability} must not exceed "
            f"max_mask_probability={config.max_mask_probability}"
        )
    if config.batching == "shared" and config.attention == "full":
        raise UserError(
            "batching='shared' needs attention='prefix' or 'block': under 'full' the beginning of a prompt depends on "
            "its rest; choose batching='packed'"
        )
    if (config.attention == "block") != (config.block_length > 0):
        raise UserError(
            f"attention={config.attention!r} with block_length={config.block_length}: a block length belongs to "
            "attention='block', which needs one"
        )
    if config.mask_rate == "block" and config.attention != "block":
        raise UserError(f"mask_rate='block' needs attention='block', not {config.attention!r}")
    if config.attention == "block" and config.answer_padding % config.block_length:
        raise UserError(
            f"answer_padding={config.answer_padding} must be a multiple of block_length={config.block_length}"
        )
    if config.answers == "all" and config.attention != "full":
        raise UserError(
            f"answers='all' needs attention='full': under {config.attention!r} a row is one prompt and one answer"
        )
    _check_objective(config)
    _check_quantization(config)
    _check_trained(config)


def _check_objective(config: ConfigDict) -> None:
    if config.on_policy and config.complementary_masks:
        raise UserError("on_policy with complementary_masks: what the model leaves open has no complement; set one off")
    if config.on_policy and config.answers == "all":
        raise UserError("on_policy with answers='all': decoding fills one answer; set answers='last' or on_policy=0")
    if config.on_policy_tokens == "own" and not (config.on_policy and config.distillation_weight):
        raise UserError(
            "on_policy_tokens='own' needs on_policy and distillation_weight above 0: only a teacher can judge the "
            "model's own tokens"
        )
    if config.block_growth_steps and config.attention != "block":
        raise UserError(
            f"block_growth_steps needs attention='block', not {config.attention!r}: blocks grow up to block_length"
        )
    if config.loss_weight == "context" and config.loss_tokens != "masked":
        raise UserError("loss_weight='context' weighs hidden tokens: it needs loss_tokens='masked'")


def _check_quantization(config: ConfigDict) -> None:
    qlora = config.qlora_config
    QuantConfig(config.quantization or "nf4", config.quantization_block_size)  # raises for what it cannot be
    if not config.use_qlora:
        return
    if not qlora.load_in_4bit:
        raise UserError("qlora_config.load_in_4bit=false: for another base set use_qlora=false and quantization")
    if qlora.bnb_4bit_quant_type != "nf4":
        raise UserError(f"qlora_config.bnb_4bit_quant_type must be 'nf4', not {qlora.bnb_4bit_quant_type!r}")
    if config.quantization not in ("", "nf4"):
        raise UserError(f"quantization={config.quantization!r} contradicts use_qlora, which means nf4: set one of them")
    if config.dtype not in (AUTO, qlora.bnb_4bit_compute_dtype):
        raise UserError(
            f"qlora_config.bnb_4bit_compute_dtype={qlora.bnb_4bit_compute_dtype!r} contradicts dtype={config.dtype!r}: "
            "make them equal"
        )


def _check_trained(config: ConfigDict) -> None:
    if config.trained != "all":
        return
    if config.quantization or config.use_qlora:
        raise UserError("trained='all' with a quantised base: codes cannot be trained; set trained='adapter'")
    if config.adapter:
        raise UserError(
            f"trained='all' with adapter={config.adapter!r}: merge it first (python -m difflm_jax.export --to=merged), "
            "and name the result with model"
        )
    if config.distillation_weight:
        raise UserError("distillation_weight needs trained='adapter': with 'all' there is no frozen base to teach")
    if not config.train_mask_row:
        raise UserError("train_mask_row=false contradicts trained='all'")


def _values(config: ConfigDict, key: str) -> list[tuple[str, Any]]:
    """(name, value) of a key, and of the same key of the phases that set it for themselves."""
    own = [(f"{phase}.{key}", config[phase][key]) for phase in PHASES if key in config[phase]]
    return [(key, config[key]), *((name, value) for name, value in own if value is not None)]


def _either(allowed: tuple[str, ...]) -> str:
    return " or ".join(repr(value) for value in allowed)
