"""PEFT's `adapter_config.json`: writes ours, and checks which options of others are supported."""

import math
from collections.abc import Mapping
from typing import Any

from difflm_jax.checkpoint.peft_modules import peft_modules
from difflm_jax.checkpoint.peft_patterns import pattern_problems
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig

PEFT_VERSION = "0.21.2"  # the version whose format is written

# Keys of adapter_config.json that change the result in unsupported ways, unless they have one of these values.
_ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change the base as well
}
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "trainable_token_indices", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "target_parameters",
}  # fmt: skip
# How peft turns an unsupported adapter into an ordinary checkpoint.
MERGE = "merge it with peft (merge_and_unload, save_pretrained), and load the result as the model"
_NEUTRAL = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "exclude_modules", "layers_pattern", "megatron_core", "eva_config", "qalora_group_size", "runtime_config",
}  # fmt: skip

# Options that change the weights themselves (`peft_merged`).
_WEIGHT_CHANGES = ("use_dora", "modules_to_save")
_OF_WEIGHT_CHANGES = {*_WEIGHT_CHANGES, "ensure_weight_tying"}


def weight_changes(values: Mapping[str, Any]) -> str:
    """Returns "key=value, ..." for the options that change the weights themselves; "" if the adapter is only LoRA."""
    return ", ".join(f"{key}={_short(values[key])}" for key in _WEIGHT_CHANGES if values.get(key))


def adapter_config(
    config: LoraConfig, base_model_name: str, revision: str | None, trained_tokens: dict[str, list[int]] | None
) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": config.r,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": trained_tokens,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def config_problems(values: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Returns a message for each unsupported or invalid option in an `adapter_config.json`."""
    problems = [
        f"{key}={_short(values[key])} is not supported"
        for key, allowed in _ONLY.items()
        if key in values and values[key] not in allowed
    ]
    # An unknown option of a later peft is accepted if it is off.
    known = {*_ONLY, *_READ, *_NEUTRAL, *(_OF_WEIGHT_CHANGES if weight_changes(values) else ())}
    problems += [
        f"{key}={_short(value)} is not supported" for key, value in values.items() if key not in known and value
    ]
    if "peft_type" not in values:
        problems.append("peft_type is missing")
    if not isinstance(values.get("modules_to_save") or [], list):
        problems.append(f"modules_to_save must be a list of names, not {_short(values['modules_to_save'])}")
    if values.get("use_dora") not in (None, False, True):
        problems.append(f"use_dora must be true or false, not {_short(values['use_dora'])}")
    rank, dropout, rslora = values.get("r"), values.get("lora_dropout"), values.get("use_rslora")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        problems.append(f"r must be a positive integer, not {_short(rank)}")
    if not _is_number(values.get("lora_alpha")):
        problems.append(f"lora_alpha must be a number, not {_short(values.get('lora_alpha'))}")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        problems.append(f"lora_dropout must be at least 0 and below 1, not {_short(dropout)}")
    if rslora not in (None, False, True):
        problems.append(f"use_rslora must be true or false, not {_short(rslora)}")
    problems += pattern_problems(values)
    targets = values.get("target_modules")
    if isinstance(targets, list):
        known = list(dict.fromkeys(module.name for module in peft_modules(config)))
        outside = [str(name) for name in targets if str(name).split(".")[-1] not in known]
        if outside:
            advice = "merge the adapter with peft, and load the result as the model"
            problems.append(f"target_modules {', '.join(outside)} are none of {', '.join(known)}: {advice}")
    return problems + _trained_token_problems(values.get("trainable_token_indices"), config.vocab_size)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _trained_token_problems(indices: Any, vocab_size: int) -> list[str]:
    if not indices:
        return []
    if isinstance(indices, dict):
        if other := [name for name in indices if name.split(".")[-1] != "embed_tokens"]:
            return [f"trainable_token_indices of {', '.join(other)} are not supported (embed_tokens only)"]
        indices = next(iter(indices.values()))
    if not isinstance(indices, list) or len(indices) != 1 or not isinstance(indices[0], int):
        return [f"trainable_token_indices={_short(indices)} must be the mask token alone"]
    if not 0 <= indices[0] < vocab_size:
        return [f"trainable_token_indices={indices} is outside the base model's {vocab_size} tokens"]
    return []


def trained_token(values: Mapping[str, Any]) -> int | None:
    indices = values.get("trainable_token_indices") or None
    if isinstance(indices, dict):
        (indices,) = indices.values()
    return indices[0] if indices else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
