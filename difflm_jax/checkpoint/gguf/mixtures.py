"""Translates the metadata of mixtures of experts in GGUF files to keys of `config.json`.

A file does not tell which layers are sparse, nor how the weights of a token's experts are normalised. Both are
constants of llama.cpp (src/models/*.cpp), copied into this table.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difflm_jax.errors import UserError

_COUNT, _USED, _WIDTH, _SHARED = (
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length",
)  # fmt: skip
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The mixtures of a GGUF architecture.

    read: their keys, and the keys of `config.json`. normalised: whether the weights of a token's experts sum to one.
    permuted: whether rows of q and k are in the order of interleaved RoPE.
    """

    model_type: str
    class_name: str
    read: Mapping[str, str]
    normalised: bool
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    permuted: bool = False


_GRANITE = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
MIXTURES = {
    "qwen3moe": Mixture(
        "qwen3_moe", "Qwen3MoeForCausalLM", {_COUNT: "num_experts", _USED: "num_experts_per_tok",
                                             _WIDTH: "moe_intermediate_size"},
        True, {**_ALL_SPARSE, "norm_topk_prob": True},
    ),
    "qwen2moe": Mixture(
        "qwen2_moe", "Qwen2MoeForCausalLM", {_COUNT: "num_experts", _USED: "num_experts_per_tok",
                                             _WIDTH: "moe_intermediate_size",
                                             _SHARED: "shared_expert_intermediate_size"},
        False, {**_ALL_SPARSE, "norm_topk_prob": False},
    ),
    # Mixtral; files of Llama have no expert_count
    "llama": Mixture(
        "mixtral", "MixtralForCausalLM", {_COUNT: "num_local_experts", _USED: "num_experts_per_tok"}, True,
        permuted=True,
    ),
    "olmoe": Mixture(
        "olmoe", "OlmoeForCausalLM", {_COUNT: "num_experts", _USED: "num_experts_per_tok"}, False,
        {"norm_topk_prob": False},
    ),
    "granitemoe": Mixture(
        "granitemoe", "GraniteMoeForCausalLM", {_COUNT: "num_local_experts", _USED: "num_experts_per_tok"}, True,
        optional=_GRANITE, permuted=True,
    ),
}  # fmt: skip


def mixture_of(architecture: str, values: Mapping[str, Any]) -> Mixture | None:
    """Returns the row of a file's architecture; None if it has no experts. `values` are its keys without a prefix."""
    return None if architecture == "llama" and not values.get(_COUNT) else MIXTURES.get(architecture)


def mixture_config(
    path: Path, architecture: str, values: dict[str, Any], hf_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the keys of `config.json` that describe a mixture, and removes the GGUF keys from `values`."""
    mixture = MIXTURES[architecture]
    if missing := [f"{architecture}.{key}" for key in mixture.read if values.get(key) is None]:
        raise UserError(f"{path}: metadata lacks {', '.join(missing)}")
    if values.pop("expert_weights_norm", mixture.normalised) is not mixture.normalised:
        stated = str(not mixture.normalised).lower()
        raise UserError(f"{path}: metadata that cannot be represented: {architecture}.expert_weights_norm={stated}")
    width = hf_config["intermediate_size"]
    if _WIDTH not in mixture.read and values.pop(_WIDTH, width) != width:
        raise UserError(f"{path}: {architecture}.{_WIDTH} differs from {architecture}.feed_forward_length")
    read = {name: values.pop(key) for key, name in mixture.read.items()}
    read |= {name: values.pop(key) for key, name in mixture.optional.items() if values.get(key)}
    if "attention.scale" in mixture.optional:  # llama.cpp's scale if a file has none
        read.setdefault("attention_multiplier", hf_config["head_dim"] ** -0.5)
    if mixture.model_type == "qwen2_moe":
        read["qkv_bias"] = hf_config["attention_bias"]
    return read | dict(mixture.constants)
