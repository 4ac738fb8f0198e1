"""The shape of a model, read from a Hugging Face `config.json`; what cannot be represented is refused by name."""

import dataclasses
import math
from typing import Any

from difflm_jax.errors import UserError
from difflm_jax.models.rope import RopeConfig

# model_type -> (q, k and v have a bias by default, queries and keys are normalised per head)
_FAMILIES = {
    "llama": (False, False),  # SmolLM2 too
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}

# Keys that change the result in ways this model does not represent, unless they hold one of these values.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "pretraining_tp": (1, None),
    "num_experts": (0, 1, None),
    "num_local_experts": (0, 1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "no_rope_layers": (None, []),
    "rope_interleaved": (False, None),
    "qk_layernorm": (False, None),
    "quantization_config": (None,),  # `checkpoint.source` takes out the kinds that can be read
    "auto_map": (None, {}),
}

_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "sliding_window", "use_sliding_window", "layer_types", "max_window_layers",
}  # fmt: skip

# Keys that say how a model was trained, stored or is served, and change nothing here.
_NEUTRAL = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "initializer_range", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "use_cache",
    "_name_or_path", "_attn_implementation_autoset", "is_llama_config", "resid_pdrop",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "name_or_path", "is_decoder", "mask_token_id",
}  # fmt: skip

KNOWN_KEYS = _READ | _NEUTRAL | set(_ONLY)

# What a key must be if it is there and not null; integers are checked where they are read.
_TYPES = {
    "a string": (str, ("model_type",)),
    "a number": ((int, float), ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "sliding_window")),
    "an object": (dict, ("rope_scaling", "rope_parameters")),
    "a list": (list, ("layer_types",)),
    "true or false": (
        bool, ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    ),
}  # fmt: skip
_MAX_LAYERS, _MAX_SIZE = 10_000, 2**31 - 1  # names and shapes are made of these before any file is compared with them


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama kind: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    `vocab_size` is the number of embedding rows, which may exceed the tokenizer's. `head_dim` need not be
    `hidden_size / num_heads`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """Reads the dictionary of a `config.json`. Raises `UserError` for what this model cannot represent."""
        _check_types(hf)
        model_type = hf.get("model_type")
        if model_type not in _FAMILIES:
            raise UserError(
                f"config.json: model_type {model_type!r} is not supported (known: {', '.join(sorted(_FAMILIES))})"
            )
        for key, allowed in _ONLY.items():
            if key in hf and hf[key] not in allowed:
                raise UserError(f"config.json: {key}={_short(hf[key])} is not supported for model_type {model_type!r}")
        if experts := [key for key in hf if "expert" in key and hf[key] not in (0, 1, None, False)]:
            raise UserError(f"config.json: mixture-of-experts models are not supported ({experts[0]})")
        _refuse_sliding_window(hf)
        qkv_bias, qk_norm = _FAMILIES[model_type]
        bias = bool(hf.get("attention_bias", False)) and model_type != "mistral"
        heads = _integer(hf, "num_attention_heads")
        hidden = _integer(hf, "hidden_size")
        config = cls(
            model_type=model_type,
            vocab_size=_integer(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(hf, "intermediate_size"),
            num_layers=_integer(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_integer(hf, "num_key_value_heads") if hf.get("num_key_value_heads") else heads,
            head_dim=_integer(hf, "head_dim") if hf.get("head_dim") else hidden // heads,
            rms_norm_eps=float(hf.get("rms_norm_eps") or 1e-6),
            rope=RopeConfig.from_hf(hf),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias or bias,
            o_bias=bias and not qkv_bias,  # Qwen2 has q, k and v biases only, whatever attention_bias says
            mlp_bias=bool(hf.get("mlp_bias", False)),
            qk_norm=qk_norm,
            max_position_embeddings=_integer(hf, "max_position_embeddings"),
        )
        if config.num_heads % config.num_kv_heads:
            raise UserError(
                f"config.json: num_attention_heads={config.num_heads} is not a multiple of "
                f"num_key_value_heads={config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise UserError(f"config.json: head_dim={config.head_dim} must be even")
        return config


def unknown_keys(hf: dict[str, Any]) -> list[str]:
    """Keys of a `config.json` that nothing here reads, to be announced rather than skipped in silence."""
    return sorted(set(hf) - KNOWN_KEYS)


def _check_types(hf: dict[str, Any]) -> None:
    for wording, (kind, keys) in _TYPES.items():
        for key in keys:
            value = hf.get(key)
            wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
            if value is not None and (wrong or (isinstance(value, float) and not math.isfinite(value))):
                raise UserError(f"config.json: {key} must be {wording}, not {_short(value)}")


def _refuse_sliding_window(hf: dict[str, Any]) -> None:
    """Mistral applies `sliding_window` whenever it is set; Qwen only with `use_sliding_window` and `layer_types`."""
    layer_types = {str(each) for each in hf.get("layer_types") or ["full_attention"]}
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise UserError(f"config.json: layer_types {', '.join(sorted(unknown))} are not supported")
    window = hf.get("sliding_window")
    used = hf.get("use_sliding_window", hf.get("model_type") == "mistral") or "sliding_attention" in layer_types
    if used and window is not None and window < (hf.get("max_position_embeddings") or 0):
        raise UserError(
            f"config.json: sliding_window={window} is not supported; for sequences of at most {window} tokens it "
            "changes nothing: set sliding_window to null and max_position_embeddings to at most that"
        )


def _integer(hf: dict[str, Any], key: str) -> int:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"config.json: {key} must be a positive integer, not {_short(value)}")
    if value > (_MAX_LAYERS if key == "num_hidden_layers" else _MAX_SIZE):
        raise UserError(f"config.json: {key}={_short(value)} is too large to be meant")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
