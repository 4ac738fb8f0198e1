"""Tiny random models for tests that need weights but no real ones."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from difflm_jax.checkpoint.experts import split_experts
from difflm_jax.checkpoint.fused import split_fused
from difflm_jax.checkpoint.names import set_path
from difflm_jax.checkpoint.safetensors import TensorFiles
from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.models.attention import positions_of
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.models.weights import table

HF = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """A three-layer Qwen3 unless `changes` say otherwise."""
    return ModelConfig.from_hf({**HF, **changes})


def tiny_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random float32 weights, large enough that attention and MLP matter."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for row in table(config):
        shape = row.stack + row.shape
        centre = 1.0 if "norm" in row.path[-2] else 0.0
        set_path(params, row.path, jnp.asarray(centre + 0.3 * rng.normal(size=shape), jnp.float32))
    return params


def params_from_state_dict(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our tree from a Hugging Face state dict of numpy arrays."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    files = split_fused(TensorFiles(shapes, tensors.__getitem__, ()), config)
    files = files if config.experts is None else split_experts(files, config)
    params: dict[str, Any] = {}
    for row in table(config):
        leaves = [np.asarray(files.read(name), np.float32) for name in row.hf_names]
        set_path(params, row.path, jnp.asarray(np.reshape(leaves, row.stack + row.shape)))
    return params


def hidden_states(
    model: Transformer, rule: DiffusionConfig, variables: Any, tokens: Any, valid: Any, prompts: Any, seeds: Any = None
) -> Any:
    """[B, T, D] of rows padded on either side, each token seeing what `rule` lets it see."""
    layout = Layout(positions_of(valid), valid, prompts)
    return model.apply(variables, tokens, layout.positions, rule.view(layout), seeds)
