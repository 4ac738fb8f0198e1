"""Opens a .gguf file as a source of weights, with Hugging Face's names, layout and metadata.

The `gguf` package (numpy only) reads the format. The keys are those of the GGUF specification
(github.com/ggml-org/ggml/blob/master/docs/gguf.md). Changes that llama.cpp's converter made to weights are undone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerBase

from difflm_jax.checkpoint.gguf.header import check_header
from difflm_jax.checkpoint.gguf.mixtures import MIXTURES, mixture_config, mixture_of
from difflm_jax.checkpoint.gguf.reader import Reader
from difflm_jax.checkpoint.gguf.tokenizer import build_tokenizer
from difflm_jax.checkpoint.safetensors import TensorFiles
from difflm_jax.errors import UserError, one_line
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.rope import RopeConfig, inverse_frequencies
from difflm_jax.models.weights import table

# GGUF's architecture -> transformers' model_type and class
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_ROPE_SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# Keys that change no result, and keys that change none at one value. 0 and false count as "off".
_NEUTRAL = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_NEUTRAL_AT = {
    "attention.output_scale": 1.0,
    "embedding_scale": 1.0,
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
}
_SHARED_GATE = ".shared_expert_gate.weight"
_ROPE_FREQS = "rope_freqs.weight"
_PERMUTED = {"self_attn.q_proj": "num_heads", "self_attn.k_proj": "num_kv_heads"}


def open_gguf(path: Path) -> tuple[dict[str, Any], TensorFiles, Callable[[], PreTrainedTokenizerBase]]:
    """Returns (config, tensors, a function that builds the tokenizer), with Hugging Face's keys and names.

    Raises `UserError` for a damaged file and for an architecture, a key or a RoPE that is not supported.
    """
    try:
        check_header(path)
        reader = Reader(path)
    except Exception as error:  # the reader checks little: a damaged file raises errors of numpy
        raise UserError(f"{path}: not a complete GGUF file ({one_line(error)}); fetch it again") from error
    metadata = _Metadata(path, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    hf_config = _hf_config(metadata, tensors)
    try:
        config = ModelConfig.from_hf(hf_config)
    except UserError as error:
        raise UserError(f"{path}: metadata: {str(error).removeprefix('config.json: ')}") from error
    tensors.pop(_ROPE_FREQS, None)  # the config has it now
    named = _by_hf_name(tensors, config)
    shapes = {name: _shape(tensor)[0 if expert is None else 1 :] for name, (tensor, expert) in named.items()}
    for name in (name for name in named if name.endswith(_SHARED_GATE)):  # a vector in llama.cpp
        shapes[name] = (1, *shapes[name][-1:])
    mixture = MIXTURES.get(metadata.architecture)
    is_permuted = metadata.architecture == "llama" or (mixture is not None and mixture.permuted)

    def read(name: str) -> np.ndarray:
        array = _dequantize(path, *named[name])
        reader.release()
        for module, heads in _PERMUTED.items():
            if is_permuted and f".{module}." in name:
                array = _unpermute(array, getattr(config, heads))
        if config.norm_offset and "norm.weight" in name:  # llama.cpp's converter adds it
            array = array - np.float32(config.norm_offset)
        return array.reshape(shapes[name]) if name.endswith(_SHARED_GATE) else array

    return hf_config, TensorFiles(shapes, read), lambda: build_tokenizer(metadata)


def _by_hf_name(tensors: dict[str, ReaderTensor], config: ModelConfig) -> dict[str, tuple[ReaderTensor, int | None]]:
    """Maps Hugging Face's name to (tensor, the expert whose slice it is; None: the whole tensor).

    A tensor that the table lacks keeps its own name, for error messages.
    """
    named, others = {}, dict(tensors)
    for row in table(config):
        for layer, gguf in enumerate(row.gguf_names):
            tensor = others.get(gguf)
            if tensor is None or (row.experts and _shape(tensor)[:-2] != (row.experts,)):
                continue
            del others[gguf]
            if not row.experts:
                named[row.hf_names[layer]] = (tensor, None)
            for expert in range(row.experts):
                named[row.hf_names[layer * row.experts + expert]] = (tensor, expert)
    return named | {name: (tensor, None) for name, tensor in others.items()}


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


class _Metadata:
    """The key-value part of a file. Values are decoded on access."""

    def __init__(self, path: Path, reader: GGUFReader):
        self.path = path
        self._fields = reader.fields
        if reader.byte_order != "I":
            raise UserError(f"{path}: is in the other byte order; convert it for this machine")
        if (self.get("split.count") or 1) > 1:
            raise UserError(f"{path}: is one of {self.get('split.count')} parts; join them with gguf-split --merge")
        self.architecture = self.get("general.architecture")
        if self.architecture not in _ARCHITECTURES | MIXTURES:
            known = ", ".join(sorted(_ARCHITECTURES | MIXTURES))
            raise UserError(f"{path}: architecture {self.architecture!r} is not supported (known: {known})")

    def get(self, key: str) -> Any:
        """Returns the value of `key`, or None if the file lacks it."""
        field = self._fields.get(key)
        value = None if field is None else field.contents()
        # float32 1e-5 is 9.999999747378752e-06; its shortest spelling is the intended value
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def of_architecture(self) -> dict[str, Any]:
        """Returns the values under `{architecture}.`, without that prefix."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): self.get(key) for key in self._fields if key.startswith(prefix)}


def _hf_config(metadata: _Metadata, tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    """Returns the `config.json` that the model's Hugging Face repository would have."""
    path, values = metadata.path, metadata.of_architecture()
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: has no token_embd.weight")
    if missing := [key for key in _SIZES if values.get(key) is None]:
        raise UserError(f"{path}: metadata lacks {', '.join(f'{metadata.architecture}.{key}' for key in missing)}")
    mixture = mixture_of(metadata.architecture, values)
    model_type, architecture = (
        (mixture.model_type, mixture.class_name) if mixture else _ARCHITECTURES[metadata.architecture]
    )
    hf_config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    for key, name in _SIZES.items():
        hf_config[name] = values.pop(key)
    for key, name in _IDS.items():
        hf_config[name] = metadata.get(f"tokenizer.ggml.{key}")
    hf_config["num_key_value_heads"] = values.pop("attention.head_count_kv", hf_config["num_attention_heads"])
    head_dim = values.pop("attention.key_length", None) or _head_dim(path, hf_config)
    hf_config["head_dim"] = head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := values.pop(key, head_dim)) != head_dim:
            raise UserError(f"{path}: {metadata.architecture}.{key}={other} differs from the head size {head_dim}")
    hf_config["rope_theta"] = values.pop("rope.freq_base", 10000.0)
    hf_config["rope_scaling"] = _rope_scaling(path, values, hf_config, tensors.get(_ROPE_FREQS))
    if model_type == "gemma3_text":
        hf_config |= _gemma3(values, hf_config)
    if mixture is not None:
        hf_config |= mixture_config(path, metadata.architecture, values, hf_config)
    if strange := [key for key, value in values.items() if not _is_neutral(key, value, hf_config)]:
        named = ", ".join(f"{metadata.architecture}.{key}" for key in strange)
        raise UserError(f"{path}: metadata that cannot be represented: {named}")
    return hf_config


def _is_neutral(key: str, value: Any, hf_config: dict[str, Any]) -> bool:
    """Whether a key changes no result, because its value is the architecture's default."""
    if key == "attention.causal":
        return value is True
    if key in _NEUTRAL or value in (0, False):
        return True
    if key == "attention.scale":
        return bool(np.isclose(value, hf_config["head_dim"] ** -0.5, rtol=1e-6))
    if key == "attention.sliding_window":  # a window as wide as the longest row
        return isinstance(value, int) and value >= hf_config["max_position_embeddings"]
    return key in _NEUTRAL_AT and value == _NEUTRAL_AT[key]


def _gemma3(values: dict[str, Any], hf_config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config keys that are particular to Gemma 3, and removes the GGUF keys from `values`.

    The constants are those of llama.cpp, src/models/gemma3.cpp: every sixth layer is global, and local layers have a
    RoPE base of 10000. The 27B model, with 62 layers, scales scores by hidden size / number of heads.
    """
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    is_27b = hf_config["num_hidden_layers"] == 62
    pattern = values.pop("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):  # one entry per layer, True for a local one
        types = {"layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in pattern]}
    else:
        types = {"sliding_window_pattern": pattern}
    return types | {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": values.pop("attention.sliding_window", None),
        "rope_local_base_freq": values.pop("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": hidden // heads if is_27b else hf_config["head_dim"],
        "final_logit_softcapping": values.pop("final_logit_softcapping", None) or None,
        "attn_logit_softcapping": values.pop("attn_logit_softcapping", None) or None,
    }


def _head_dim(path: Path, hf_config: dict[str, Any]) -> int:
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    if not isinstance(heads, int) or heads <= 0:  # llama.cpp also allows one number per layer
        raise UserError(f"{path}: attention.head_count must be one positive number, not {heads}")
    return hidden // heads


def _rope_scaling(
    path: Path, values: dict[str, Any], hf_config: dict[str, Any], rope_freqs: ReaderTensor | None
) -> dict[str, Any] | None:
    """Returns `rope_scaling`, from the metadata (whose keys are removed from `values`) or from frequency factors."""
    # llama.cpp treats a factor without a type as linear scaling
    rope_type = values.pop("rope.scaling.type", "linear" if values.get("rope.scaling.factor") else "none")
    options = {name: values.pop(f"rope.scaling.{key}", None) for key, name in _ROPE_SCALING.items()}
    options = {name: value for name, value in options.items() if value is not None}
    if rope_type not in ("none", "linear", "yarn"):
        raise UserError(f"{path}: rope.scaling.type {rope_type!r} is not supported")
    if rope_freqs is not None:
        if rope_type != "none":
            raise UserError(f"{path}: has both {_ROPE_FREQS} and rope.scaling.type {rope_type!r}")
        return _llama3_scaling(path, hf_config, _dequantize(path, rope_freqs))
    if rope_type == "none":
        return None
    if rope_type == "linear":
        options.pop("original_max_position_embeddings", None)  # linear scaling does not depend on it
    return {"rope_type": rope_type, **options}


def _llama3_scaling(path: Path, hf_config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Returns the Llama 3.1 rule that `rope_freqs.weight` was computed from: original / scaled frequency per pair.

    The file lacks the constants of the rule. They must be those of Llama 3.1 to 3.3, or `UserError` is raised.
    """
    options = {
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta, head_dim = hf_config["rope_theta"], hf_config["head_dim"]
    plain, _ = inverse_frequencies(RopeConfig(theta), head_dim)
    scaled, _ = inverse_frequencies(RopeConfig(theta, "llama3", tuple(options.items())), head_dim)
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise UserError(f"{path}: {_ROPE_FREQS} is not the scaling of Llama 3.1, the only one that can be represented")
    return {"rope_type": "llama3", **options}


def _dequantize(path: Path, tensor: ReaderTensor, expert: int | None = None) -> np.ndarray:
    data = tensor.data if expert is None else tensor.data[expert]
    if tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return data
    try:
        return dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"{path}: {tensor.name} has type {tensor.tensor_type.name}, which cannot be read") from error


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of q or k from llama.cpp's interleaved RoPE to two halves. Takes [out, in] or a bias [out]."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
