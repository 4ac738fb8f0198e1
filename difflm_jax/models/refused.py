"""Error messages for unsupported models: why, and which model to use instead."""

from collections.abc import Mapping, Sequence
from typing import Any

_RECURRENT = (
    "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma",
)  # fmt: skip
_HYBRID = {
    "qwen3_next": "linear attention (Gated DeltaNet)", "qwen3_5": "linear attention (Gated DeltaNet)",
    "qwen3_5_text": "linear attention (Gated DeltaNet)", "qwen3_5_moe": "linear attention (Gated DeltaNet)",
    "qwen3_5_moe_text": "linear attention (Gated DeltaNet)", "olmo_hybrid": "linear attention (Gated DeltaNet)",
    "kimi_linear": "linear attention (Kimi Delta)", "minimax": "linear attention (lightning)",
    "jamba": "Mamba", "bamba": "Mamba-2", "zamba": "Mamba", "zamba2": "Mamba-2", "falcon_h1": "Mamba-2",
    "nemotron_h": "Mamba-2", "granitemoehybrid": "Mamba-2", "lfm2": "short causal convolutions",
    "lfm2_moe": "short causal convolutions", "lfm3": "short causal convolutions",
}  # fmt: skip
_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "kimi_k25", "glm4_moe_lite", "longcat_flash")
_TEXT_FAMILY = {
    "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "paligemma": "gemma or gemma2",
    "llava": "llama or mistral", "mllama": "llama", "smolvlm": "llama", "idefics3": "llama", "internvl": "qwen2",
    "gemma3": "gemma3_text", "mistral3": "ministral3 or mistral", "cohere2_vision": "cohere2",
    "gemma3n": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text", "exaone4_5": "exaone4",
}  # fmt: skip
_OTHER = {
    "gemma3n_text": "its layers have embeddings of their own and share keys and values; use gemma3_text",
    "diffusion_gemma": "it has an encoder and a decoder; use gemma4_text",
    "diffusion_gemma_text": "it has an encoder and a decoder; use gemma4_text",
    "gpt2": "it has learned positions (wpe) and no RoPE; use llama or qwen3",
    "opt": "it has learned positions and no RoPE; use llama or qwen3",
    "bloom": "it has ALiBi and no RoPE; use llama or qwen3",
    "mpt": "it has ALiBi and no RoPE; use llama or qwen3",
    "llama4": "its layers attend within fixed chunks (attention_chunk_size); use llama or qwen3",
    "llama4_text": "its layers attend within fixed chunks (attention_chunk_size); use llama or qwen3",
}  # fmt: skip


def refusal(hf: Mapping[str, Any], known: Sequence[str]) -> str:
    """Returns one line that says why a `config.json` of an unknown family cannot be used, and what to use instead."""
    model_type = hf.get("model_type")
    head = f"model_type {model_type!r} is not supported"
    if model_type in _RECURRENT:
        return f"{head}: all its layers are recurrent, so that no token can see a later one; use llama or qwen3"
    if (kind := _HYBRID.get(model_type)) is not None or "linear_attention" in (hf.get("layer_types") or ()):
        return (
            f"{head}: some of its layers (layer_types, layers_block_type or hybrid_override_pattern) are "
            f"{kind or 'linear attention'}, which see earlier tokens only; use a model all of whose layers are "
            "attention, such as qwen3 or llama"
        )
    if hf.get("is_encoder_decoder"):
        return f"{head}: is_encoder_decoder=true, an encoder and a decoder; use a decoder, such as qwen3 or llama"
    if model_type in _LATENT or hf.get("kv_lora_rank"):
        return (
            f"{head}: its attention is latent (kv_lora_rank); use a model with grouped-query attention, such as qwen3"
        )
    if model_type in _TEXT_FAMILY or "vision_config" in hf:
        instead = _TEXT_FAMILY.get(model_type, "qwen3 or llama")
        return f"{head}: it reads images too (vision_config); use a text model of its kind ({instead})"
    if model_type in _OTHER:
        return f"{head}: {_OTHER[model_type]}"
    if experts := [key for key in hf if "expert" in key and hf[key] not in (0, 1, None, False)]:
        return f"{head}: mixtures of experts of this kind are not ({experts[0]}); use qwen3_moe, mixtral or a dense one"
    return f"{head} (known: {', '.join(known)})"
