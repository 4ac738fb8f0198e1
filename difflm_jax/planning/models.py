"""Shapes of common models by name, from their `config.json`, so that a plan needs no network."""

from typing import Any

from difflm_jax.models.config import ModelConfig

_ORGANISATIONS = ("", "qwen", "meta-llama", "huggingfacetb", "mistralai", "tinyllama", "unsloth")

_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _shape(family: dict[str, Any], sizes: tuple[int, ...], tied: bool, longest: int, **more: Any) -> dict[str, Any]:
    named = dict(zip(_SIZES, sizes, strict=True))
    return {**family, **named, "tie_word_embeddings": tied, "max_position_embeddings": longest, **more}


# If a model's name begins with several of these names, the longest one is used.
_SHAPES = {
    "qwen3-0.6b": _shape(_QWEN3, (1024, 3072, 28, 16, 8), True, 40960),
    "qwen3-1.7b": _shape(_QWEN3, (2048, 6144, 28, 16, 8), True, 40960),
    "qwen3-4b": _shape(_QWEN3, (2560, 9728, 36, 32, 8), True, 40960),
    "qwen3-4b-instruct-2507": _shape(_QWEN3, (2560, 9728, 36, 32, 8), True, 262144, rope_theta=5e6),
    "qwen3-4b-thinking-2507": _shape(_QWEN3, (2560, 9728, 36, 32, 8), True, 262144, rope_theta=5e6),
    "qwen3-8b": _shape(_QWEN3, (4096, 12288, 36, 32, 8), False, 40960),
    "qwen3-14b": _shape(_QWEN3, (5120, 17408, 40, 40, 8), False, 40960),
    "qwen3-32b": _shape(_QWEN3, (5120, 25600, 64, 64, 8), False, 40960),
    "qwen3-30b-a3b": _shape(_QWEN3_MOE, (2048, 6144, 48, 32, 4), False, 40960, moe_intermediate_size=768),
    "qwen3-235b-a22b": _shape(_QWEN3_MOE, (4096, 12288, 94, 64, 4), False, 40960, moe_intermediate_size=1536),
    "qwen2.5-0.5b": _shape(_QWEN2, (896, 4864, 24, 14, 2), True, 32768),
    "qwen2.5-1.5b": _shape(_QWEN2, (1536, 8960, 28, 12, 2), True, 32768),
    "qwen2.5-3b": _shape(_QWEN2, (2048, 11008, 36, 16, 2), True, 32768),
    "qwen2.5-7b": _shape(_QWEN2, (3584, 18944, 28, 28, 4), False, 32768, vocab_size=152064),
    "qwen2.5-14b": _shape(_QWEN2, (5120, 13824, 48, 40, 8), False, 32768, vocab_size=152064),
    "qwen2.5-32b": _shape(_QWEN2, (5120, 27648, 64, 40, 8), False, 32768, vocab_size=152064),
    "llama-3.2-1b": _shape(_LLAMA3, (2048, 8192, 16, 32, 8), True, 131072),
    "llama-3.2-3b": _shape(_LLAMA3, (3072, 8192, 28, 24, 8), True, 131072),
    "llama-3.1-8b": _shape(_LLAMA3, (4096, 14336, 32, 32, 8), False, 131072),
    "llama-3.1-70b": _shape(_LLAMA3, (8192, 28672, 80, 64, 8), False, 131072),
    "llama-3.3-70b": _shape(_LLAMA3, (8192, 28672, 80, 64, 8), False, 131072),
    "smollm2-135m": _shape(_SMOLLM2, (576, 1536, 30, 9, 3), True, 8192),
    "smollm2-360m": _shape(_SMOLLM2, (960, 2560, 32, 15, 5), True, 8192),
    "smollm2-1.7b": _shape(_SMOLLM2, (2048, 8192, 24, 32, 32), True, 8192),
    "mistral-7b-v0.3": _shape(_LLAMA3, (4096, 14336, 32, 32, 8), False, 32768, vocab_size=32768, rope_theta=1e6),
    "mistral-7b-instruct-v0.3": _shape(_LLAMA3, (4096, 14336, 32, 32, 8), False, 32768, vocab_size=32768),
    "tinyllama-1.1b": _shape(_SMOLLM2, (2048, 5632, 22, 32, 4), False, 2048, vocab_size=32000, rope_theta=1e4),
}


def known_shape(name: str) -> ModelConfig | None:
    """Returns the shape of a common model by hub id or name (also -Instruct, -Base and the like); None if unknown."""
    organisation, _, model = name.lower().rpartition("/")
    fitting = [key for key in _SHAPES if model == key or model.startswith(f"{key}-")]
    if organisation not in _ORGANISATIONS or not fitting:
        return None
    return ModelConfig.from_hf(_SHAPES[max(fitting, key=len)])
