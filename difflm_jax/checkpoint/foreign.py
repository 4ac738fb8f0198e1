"""Third-party diffusion checkpoints: translates their `config.json` into that of our families and a diffusion config.

They are decoders that this package has, with other keys and names and with attention that is not causal. None of their
code is run. The meaning of each key is defined here, from their papers and published configurations. An unknown key is
refused, since it might change the result.

  llada      LLaDA-8B (arXiv:2502.09992): Llama with OLMo's keys and tensor names; full attention, no shift
  dream      Dream-7B (arXiv:2508.15487): Qwen2.5; full attention, logit shift
  a2d-*      dLLM's converted Qwen and Llama (github.com/ZHZisZZ/dllm): full attention, or blocks of 32 (`bd3lm`)
  sdar       SDAR (arXiv:2510.06303): Qwen3; blocks counted from the first token, of 4 unless the config says otherwise
  sdar_moe   SDAR with Qwen3's mixture of experts
  llama, recognised by its class   Stable-DiffCoder (github.com/ByteDance-Seed/Stable-DiffCoder): Llama; blocks of 4 as
      in SDAR
  nemotron_labs_diffusion   NVIDIA's (huggingface.co/nvidia/Nemotron-Labs-Diffusion-8B): Ministral 3 with other tensor
      names; a block of 32 sees itself and a causal context
  lladamoe   LLaDA-MoE (arXiv:2509.24389; its model_type is llada): Qwen3's mixture; full attention, no shift
  llada2_moe LLaDA 2 (arXiv:2512.15745): the mixture of GLM 4.5 with Ling's names; blocks of 32
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from difflm_jax.errors import UserError
from difflm_jax.models.config import KNOWN_KEYS
from difflm_jax.models.families import FAMILIES

A2D_BLOCK_LENGTH = 32  # as in dLLM's own block-diffusion recipes and sampler
SDAR_BLOCK_LENGTH = 4
DIFFCODER_BLOCK_LENGTH = 4  # like the mask id, from its `generate`: config.json has neither
NEMOTRON_BLOCK_LENGTH = 32
_DIFFCODER_MASK_TOKEN_ID = 5
_NEMOTRON_MASK_TOKEN_ID = 100
LLADA2_BLOCK_LENGTH = 32
_QWEN_MASK_TOKEN_ID = 151669
_DREAM_MASK_TOKEN_ID = 151666
_LLADA_MASK_TOKEN_ID = 126336
_LING_MASK_TOKEN_ID = 156895  # from the tokenizer of LLaDA-MoE and LLaDA 2


@dataclasses.dataclass(frozen=True)
class FieldCheckpoint:
    """A third-party checkpoint in our terms.

    hf_config: its `config.json` with the keys of one of our families. diffusion: contents of `diffusion_config.json`.
    names: the table of `checkpoint.names` for its tensors, or "". fused: as `Structure.fused`, for tensors that the
    checkpoint has fused but our family has not.
    """

    hf_config: dict[str, Any]
    diffusion: dict[str, Any]
    names: str = ""
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


def read_field_config(hf_config: Mapping[str, Any], name: str) -> FieldCheckpoint | None:
    """Translates the `config.json` of a third-party checkpoint called `name`; returns None for our own families.

    Raises `UserError` for an unknown key or value that could change the result.
    """
    model_type = hf_config.get("model_type")
    if model_type == "llama" and _DIFFCODER_CLASS in (hf_config.get("architectures") or ()):
        model_type = _DIFFCODER_CLASS
    reader = _READERS.get(model_type.lower()) if isinstance(model_type, str) else None
    return reader(dict(hf_config), name) if reader is not None else None


# LLaDA's keys for options that are not supported here, with the allowed values. A missing key is allowed too.
_LLADA_ONLY = {
    "activation_type": ("silu", "swiglu"), "alibi": (False,), "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None), "block_group_size": (1,), "block_type": ("llama",), "clip_qkv": (None,),
    "include_bias": (False,), "include_qkv_bias": (False,), "input_emb_norm": (False,), "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,), "multi_query_attention": (None, False), "rope": (True,),
    "rope_full_precision": (True,), "scale_logits": (False,),
}  # fmt: skip
_LLADA_SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_LLADA_READ = {*_LLADA_SIZES.values(), "embedding_size", "vocab_size", "weight_tying", "mlp_ratio", "mask_token_id"}
_LLADA_NEUTRAL = {
    "alibi_bias_max", "attention_layer_norm_with_affine", "embedding_dropout", "flash_attention", "init_cutoff_factor",
    "init_device", "init_fn", "init_std", "precision", "residual_dropout",
}  # fmt: skip

# Keys of the other checkpoints that concern only training or serving.
_NEUTRAL = {"auto_map", "block_length", "block_size", "debug", "fuse_cross_entropy", "use_regular_causal"}
_DREAM_ONLY = {"use_mrope": (False, None)}
_DIFFCODER_CLASS = "StableDiffcoderForCausalLM"  # its model_type is llama

# Nemotron-Labs-Diffusion: "bidirectional" (decoding) and "block_diff" (training) are the same weights.
_NEMOTRON_ONLY = {"dlm_paradigm": ("bidirectional", "block_diff"), "sliding_window": (None,)}
_NEMOTRON_NEUTRAL = {
    "ada_dlm_loss_ratio", "ada_perm_ratio_global", "ada_perm_ratio_per_block", "adaptive_mask_rate", "ar_loss_weight",
    "attn_implementation", "complementary_mask", "diff_loss_weight", "dlm_loss_weight", "dp_varying_mask_ratio",
    "global_loss_avg", "multi_sampling", "num_skip_loss_tokens", "prefix_ratio", "random_length_prob",
    "tok_mask_half_life_ratio",
}  # fmt: skip


def _llada(hf_config: dict[str, Any], name: str) -> FieldCheckpoint:
    if "num_experts" in hf_config:
        return _llada_moe(hf_config, name)
    _check("llada", hf_config, {**_LLADA_ONLY}, _LLADA_READ | _LLADA_NEUTRAL)
    for key in ("block_type", "layer_norm_type", "activation_type", "rope"):
        if key not in hf_config:
            raise UserError(f"config.json: {key} is missing (model_type 'llada' needs it)")
    translated = {ours: hf_config.get(theirs) for ours, theirs in _LLADA_SIZES.items()}
    if translated["intermediate_size"] is None and isinstance(translated["hidden_size"], int):
        translated["intermediate_size"] = hf_config.get("mlp_ratio", 4) * translated["hidden_size"]
    translated |= {
        "model_type": "llama",
        "vocab_size": hf_config.get("embedding_size") or hf_config.get("vocab_size"),
        "tie_word_embeddings": hf_config.get("weight_tying"),
        "eos_token_id": hf_config.get("eos_token_id"),
        "pad_token_id": hf_config.get("pad_token_id"),
        "attention_bias": False,
        "mlp_bias": False,
    }
    diffusion = _diffusion(hf_config, _LLADA_MASK_TOKEN_ID, attention="full", logit_shift=False)
    return FieldCheckpoint(translated, diffusion, names="llada")


def _dream(hf_config: dict[str, Any], _name: str) -> FieldCheckpoint:
    _check("dream", hf_config, _DREAM_ONLY, KNOWN_KEYS | _NEUTRAL)
    diffusion = _diffusion(hf_config, _DREAM_MASK_TOKEN_ID, attention="full", logit_shift=True, algorithm="entropy")
    return FieldCheckpoint(_ours(hf_config, "qwen2", tuple(_DREAM_ONLY)), diffusion)


def _a2d(hf_config: dict[str, Any], name: str) -> FieldCheckpoint:
    """Translates dLLM's checkpoints. Only their name tells whether attention is full or in blocks."""
    family = hf_config["model_type"].lower().removeprefix("a2d-")
    _check(f"a2d-{family}", hf_config, {}, KNOWN_KEYS | _NEUTRAL)
    rule: dict[str, Any] = {"attention": "full"}
    if "bd3lm" in name.lower():
        rule = {"attention": "block_causal", "block_length": hf_config.get("block_size") or A2D_BLOCK_LENGTH}
        print(f"{name}: named as block diffusion, so decoded in blocks of {rule['block_length']} (attention overrides)")
    default = None if family == "llama" else _QWEN_MASK_TOKEN_ID
    return FieldCheckpoint(_ours(hf_config, family), _diffusion(hf_config, default, logit_shift=False, **rule))


def _sdar(hf_config: dict[str, Any], _name: str) -> FieldCheckpoint:
    _check("sdar", hf_config, {}, KNOWN_KEYS | _NEUTRAL)
    length = hf_config.get("block_size") or hf_config.get("block_length") or SDAR_BLOCK_LENGTH
    rule = {"attention": "block_causal", "block_length": length}
    return FieldCheckpoint(
        _ours(hf_config, "qwen3"), _diffusion(hf_config, _QWEN_MASK_TOKEN_ID, logit_shift=False, **rule)
    )


def _stable_diffcoder(hf_config: dict[str, Any], _name: str) -> FieldCheckpoint:
    _check("llama", hf_config, {}, KNOWN_KEYS | _NEUTRAL)
    rule = {"attention": "block_causal", "block_length": DIFFCODER_BLOCK_LENGTH}
    return FieldCheckpoint(
        _ours(hf_config, "llama"), _diffusion(hf_config, _DIFFCODER_MASK_TOKEN_ID, logit_shift=False, **rule)
    )


def _nemotron(hf_config: dict[str, Any], _name: str) -> FieldCheckpoint:
    own = _NEMOTRON_NEUTRAL | set(_NEMOTRON_ONLY)
    _check("nemotron_labs_diffusion", hf_config, _NEMOTRON_ONLY, KNOWN_KEYS | _NEUTRAL | _NEMOTRON_NEUTRAL)
    length = hf_config.get("block_size") or NEMOTRON_BLOCK_LENGTH
    rule = {"attention": "causal_context", "block_length": length}
    named = None if hf_config.get("mask_token_id") == -1 else hf_config.get("mask_token_id")  # -1: not set
    diffusion = _diffusion({"mask_token_id": named}, _NEMOTRON_MASK_TOKEN_ID, logit_shift=False, **rule)
    return FieldCheckpoint(_ours(hf_config, "ministral3", tuple(own)), diffusion, names="nemotron_labs_diffusion")


def _sdar_moe(hf_config: dict[str, Any], _name: str) -> FieldCheckpoint:
    _check("sdar_moe", hf_config, {}, KNOWN_KEYS | _NEUTRAL | _mixture_keys("qwen3_moe"))
    return FieldCheckpoint(_ours(hf_config, "qwen3_moe"), _blocks(hf_config, SDAR_BLOCK_LENGTH, _QWEN_MASK_TOKEN_ID))


# Keys of LLaDA-MoE for options that its published models do not use, with the allowed values.
_LLADA_MOE_ONLY = {
    "clip_qkv": (None,), "moe_router_score_function": ("softmax",), "moe_router_enable_expert_bias": (False, None),
    "shared_expert_intermediate_size": (None, 0), "router_num_group": (None, 1), "router_topk_group": (None, 1),
    "routed_scaling_factor": (1, None), "qk_layernorm": (True,), "partial_rotary_factor": (1, None),
    "norm_topk_prob": (False, None),  # the published class never normalises
}  # fmt: skip
_LLADA_MOE_SIZES = {"dense_intermediate_size": "intermediate_size", "expert_intermediate_size": "moe_intermediate_size"}


def _llada_moe(hf_config: dict[str, Any], _name: str) -> FieldCheckpoint:
    known = {*_LLADA_MOE_SIZES, "moe_layer_freq"} | _mixture_keys("qwen3_moe")
    _check("lladamoe", hf_config, _LLADA_MOE_ONLY, KNOWN_KEYS | _NEUTRAL | known)
    sparse = hf_config.get("moe_layer_freq") or []
    if not isinstance(sparse, list):
        raise UserError(f"config.json: moe_layer_freq must be a list with 0 for dense layers, not {str(sparse)[:60]!r}")
    translated = {
        **_ours(hf_config, "qwen3_moe", (*_LLADA_MOE_ONLY, *_LLADA_MOE_SIZES, "moe_layer_freq")),
        **{ours: hf_config.get(theirs) for theirs, ours in _LLADA_MOE_SIZES.items()},
        "mlp_only_layers": [layer for layer, frequency in enumerate(sparse) if not frequency],
        "norm_topk_prob": False,
    }
    return FieldCheckpoint(translated, _diffusion(hf_config, _LING_MASK_TOKEN_ID, attention="full", logit_shift=False))


_LLADA2_ONLY = {
    "use_qkv_bias": (False, None), "use_bias": (False,), "norm_head": (False, None), "use_qk_norm": (True, None),
    "score_function": ("sigmoid", None), "moe_router_enable_expert_bias": (True, None), "norm_topk_prob": (True, None),
    "use_sliding_window": (False, None), "num_nextn_predict_layers": (0, None),
}  # fmt: skip
_LLADA2_COUNTS = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
_LLADA2_NEUTRAL = {"router_dtype", "output_dropout", "rotary_dim", "max_window_layers", "sliding_window"}


def _llada2(hf_config: dict[str, Any], _name: str) -> FieldCheckpoint:
    known = {*_LLADA2_COUNTS, *_LLADA2_NEUTRAL} | _mixture_keys("glm4_moe")
    _check("llada2_moe", hf_config, _LLADA2_ONLY, KNOWN_KEYS | _NEUTRAL | known)
    translated = {
        **_ours(hf_config, "glm4_moe", (*_LLADA2_ONLY, *_LLADA2_COUNTS, *_LLADA2_NEUTRAL)),
        **{ours: hf_config.get(theirs) for theirs, ours in _LLADA2_COUNTS.items()},
        "attention_bias": False,
        "use_qk_norm": True,
        "norm_topk_prob": True,
    }
    diffusion = _blocks(hf_config, LLADA2_BLOCK_LENGTH, _LING_MASK_TOKEN_ID)
    return FieldCheckpoint(translated, diffusion, "llada2", (("query_key_value", ("q_proj", "k_proj", "v_proj")),))


def _blocks(hf_config: Mapping[str, Any], default: int, mask_token_id: int) -> dict[str, Any]:
    """Returns the diffusion config of block-causal attention; `default` is the block length if the config has none."""
    length = hf_config.get("block_size") or hf_config.get("block_length") or default
    return _diffusion(hf_config, mask_token_id, attention="block_causal", block_length=length, logit_shift=False)


def _mixture_keys(model_type: str) -> set[str]:
    """Returns the keys of `config.json` that describe experts in this family."""
    return FAMILIES[model_type].experts.keys()


_READERS = {
    "sdar_moe": _sdar_moe, "lladamoe": _llada_moe, "llada_moe": _llada_moe, "llada2_moe": _llada2,
    "llada": _llada, "dream": _dream, "sdar": _sdar, "a2d-qwen2": _a2d, "a2d-qwen3": _a2d, "a2d-llama": _a2d,
    _DIFFCODER_CLASS.lower(): _stable_diffcoder, "nemotron_labs_diffusion": _nemotron,
}  # fmt: skip


def _ours(hf_config: Mapping[str, Any], model_type: str, dropped: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the keys that `ModelConfig` reads, with one of our families as `model_type`."""
    kept = {key: value for key, value in hf_config.items() if key not in (*_NEUTRAL, *dropped, "architectures")}
    return {**kept, "model_type": model_type}


def _diffusion(hf_config: Mapping[str, Any], mask_token_id: int | None, **rule: Any) -> dict[str, Any]:
    named = hf_config.get("mask_token_id")
    found = {"algorithm": "probability", "mask_token_id": mask_token_id if named is None else named, **rule}
    for key in ("mask_token_id", "block_length"):
        if isinstance(found.get(key), bool) or not isinstance(found.get(key, 0), int | None):
            raise UserError(f"config.json: {key} must be an integer, not {str(found[key])[:60]!r}")
    return {key: value for key, value in found.items() if value is not None}


def _check(family: str, hf_config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], known: set[str]) -> None:
    for key, allowed in only.items():
        if key in hf_config and hf_config[key] not in allowed:
            raise UserError(f"config.json: {key}={str(hf_config[key])[:60]} is not supported for model_type {family!r}")
    if unknown := sorted(set(hf_config) - known - KNOWN_KEYS - set(only) - _NEUTRAL):
        raise UserError(
            f"config.json: {', '.join(unknown[:5])}: not known for model_type {family!r}, and might change the result"
        )
