"""Writes small GGUF files as llama.cpp's converter does, with the writer of the `gguf` package."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

F32 = GGMLQuantizationType.F32

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "gemma3_text": "gemma3",
}


def gguf_architecture(model_type: str) -> str:
    return _ARCHITECTURES[model_type]


def gguf_name(name: str, architecture: str = "llama") -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`, implemented a second time on purpose."""
    names = _NAMES | _GEMMA_NAMES if architecture == "gemma3" else _NAMES
    module, leaf = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        module = module.replace("block_sparse_moe.router", "mlp.gate").replace("block_sparse_moe.", "mlp.")
        return f"blk.{layer}.{names[module]}.{leaf}"
    return f"{names[module]}.{leaf}"


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel.permute`."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    kind: GGMLQuantizationType = F32,
    metadata: Callable[[GGUFWriter], None] = lambda writer: None,
    tensors: dict[str, np.ndarray | None] | None = None,
    leave_out: Iterable[str] = (),
) -> Path:
    """Writes a GGUF file of a small transformers model: matrices in `kind`, everything else in float32.

    `metadata` adds keys, `tensors` adds tensors under GGUF names, and names of tensors and keys can be left out.
    """
    config = model.config
    writer = _Writer(path, _ARCHITECTURES[config.model_type], frozenset(leave_out))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if hasattr(config, "num_experts_per_tok"):
        count = "num_experts" if hasattr(config, "num_experts") else "num_local_experts"
        writer.add_expert_count(getattr(config, count))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type in ("qwen3_moe", "qwen2_moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "granitemoe":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    add_tokenizer(writer, [f"t{i}" for i in range(config.vocab_size)])
    metadata(writer)
    for hf_name, array in _arrays(model).items():
        name = gguf_name(hf_name, _ARCHITECTURES[config.model_type])
        if name in writer.left_out:
            continue
        if array.ndim > 1 and kind is not F32 and "ffn_gate_inp" not in name:  # llama.cpp keeps routers in float32
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(
    writer: GGUFWriter,
    tokens: list[str],
    types: list[int] | None = None,
    merges: list[str] | None = None,
    **values: Any,
) -> None:
    """Adds the keys `tokenizer.ggml.*`; `values` overrides and extends them (None removes one)."""
    values = {"model": "gpt2", "pre": "smollm", "bos_token_id": 1, "eos_token_id": 2, **values}
    types = types or [int(TokenType.CONTROL if i < 3 else TokenType.NORMAL) for i in range(len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for key, value in values.items():
        if value is None:
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
        else:
            add[type(value)](f"tokenizer.ggml.{key}", value)


class _Writer(GGUFWriter):
    """A writer that can leave out keys, and keeps the last value of a key that is written twice."""

    def __init__(self, path: Path, architecture: str, left_out: frozenset[str]):
        self.left_out = left_out
        super().__init__(path, architecture)

    def add_key_value(self, key: str, val: Any, *args: Any, **kwargs: Any) -> None:
        self.kv_data[0].pop(key, None)
        if key not in self.left_out:
            super().add_key_value(key, val, *args, **kwargs)


def _halves(array: np.ndarray) -> dict[str, np.ndarray]:
    gate, up = np.split(array, 2, axis=1)
    return {"gate_proj": gate, "up_proj": up}


def _arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    config, arrays = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        module, leaf = name.rsplit(".", 1)
        if leaf in ("gate_up_proj", "down_proj"):  # of all experts, as transformers has them in memory
            parts = {"down_proj": array} if leaf == "down_proj" else _halves(array)
            arrays |= {f"{module}.{part}.weight": np.ascontiguousarray(each) for part, each in parts.items()}
            continue
        if name.endswith("shared_expert_gate.weight"):
            array = array[0]
        if _ARCHITECTURES[config.model_type] in ("llama", "granitemoe") and ".q_proj." in name:
            array = permute(array, config.num_attention_heads)
        if _ARCHITECTURES[config.model_type] in ("llama", "granitemoe") and ".k_proj." in name:
            array = permute(array, config.num_key_value_heads)
        if _ARCHITECTURES[config.model_type] == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        arrays[name] = np.ascontiguousarray(array)
    return arrays
