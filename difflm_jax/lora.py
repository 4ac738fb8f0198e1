"""Low-rank adaptation (arXiv:2106.09685), written by hand: y = W x + scaling * B (A dropout(x)).

The trained tree is the `lora` collection: for every adapted projection `lora_A` [N, R, in] and `lora_B` [N, out, R],
stacked over layers like the base, and `mask_row` [D], the input embedding of the mask token. All masters are float32.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.errors import UserError
from difflm_jax.parallel import TENSOR, varies
from difflm_jax.quant import QTensor, dequantize, matmul


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """PEFT's keys, with PEFT's meaning. `target_modules` are names of projections."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def lora_product(
    x_BLD: jax.Array,
    lora_A: jax.Array,
    lora_B: jax.Array,
    config: LoraConfig,
    dropout_keys_B: jax.Array | None,
) -> jax.Array:
    """scaling * B (A dropout(x)) in the dtype of `x`, [B, L, out].

    `dropout_keys_B` holds one key a row (None: no dropout), so that a row's mask depends on the row alone and not on
    the batch around it or on its padding.
    """
    if dropout_keys_B is not None and config.lora_dropout > 0:
        keep = 1.0 - config.lora_dropout
        # Of an input that is divided over devices the mask is drawn whole and cut, or it would depend on the mesh.
        parts = jax.lax.axis_size(TENSOR) if varies(x_BLD, TENSOR) else 1
        length, width = x_BLD.shape[1:]
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (length, parts * width)))(dropout_keys_B)
        if parts > 1:
            kept = jax.lax.dynamic_slice_in_dim(kept, jax.lax.axis_index(TENSOR) * width, width, axis=2)
        x_BLD = jnp.where(kept, x_BLD / jnp.asarray(keep, x_BLD.dtype), 0)
    return matmul(matmul(x_BLD, lora_A), lora_B) * jnp.asarray(config.scaling, x_BLD.dtype)


def init_lora(key: jax.Array, params: dict[str, Any], config: LoraConfig, mask_row_D: jax.Array) -> dict[str, Any]:
    """A fresh `lora` tree: A as PEFT draws it (uniform in ±1/sqrt(in), Kaiming with a = sqrt 5), B zero.

    `params` is the base (its stacked projections give the shapes), `mask_row_D` the starting mask embedding.
    Raises `UserError` for a target module that the model lacks.
    """
    lora: dict[str, Any] = {"mask_row": mask_row_D.astype(jnp.float32)}
    found = set()
    for block, projections in params["layers"].items():
        for name, leaves in projections.items():
            if name not in config.target_modules:
                continue
            found.add(name)
            layers, out_dim, in_dim = leaves["weight"].shape
            bound = 1.0 / math.sqrt(in_dim)
            factor = jax.random.uniform(
                jax.random.fold_in(key, len(found)), (layers, config.r, in_dim), jnp.float32, -bound, bound
            )
            module = {"lora_A": factor, "lora_B": jnp.zeros((layers, out_dim, config.r), jnp.float32)}
            lora.setdefault("layers", {}).setdefault(block, {})[name] = module
    if missing := set(config.target_modules) - found:
        raise UserError(f"lora_config.target_modules: the model has no {', '.join(sorted(missing))}")
    return lora


def merge_lora(
    params: dict[str, Any], lora: dict[str, Any], config: LoraConfig, mask_token_id: int | None
) -> dict[str, Any]:
    """The base with scaling * B A added to each adapted weight and the mask row put in its place.

    Sums are made in float32, a layer at a time. Quantised weights, adapted or not, become dense ones in the dtype
    of the embedding.
    """
    dtype = params["embed_tokens"]["weight"].dtype
    merged = jax.tree.map(lambda leaf: leaf, params)  # new dictionaries around the same arrays
    for block, projections in params["layers"].items():
        for name, leaves in projections.items():
            factors = lora.get("layers", {}).get(block, {}).get(name)
            weight = leaves["weight"] if isinstance(leaves, dict) else leaves
            if factors is not None or isinstance(weight, QTensor):
                merged["layers"][block][name]["weight"] = _merged_stack(weight, factors, config.scaling, dtype)
    if "mask_row" in lora and mask_token_id is not None:
        table = params["embed_tokens"]["weight"]
        merged["embed_tokens"]["weight"] = table.at[mask_token_id].set(lora["mask_row"].astype(table.dtype))
    return merged


@functools.partial(jax.jit, static_argnums=(2, 3))
def _merged_stack(weight: Any, factors: dict[str, jax.Array] | None, scaling: float, dtype: Any) -> jax.Array:
    def merged(layer: tuple[Any, dict[str, jax.Array] | None]) -> jax.Array:
        weight, factors = layer
        dense = dequantize(weight, jnp.float32) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
        if factors is not None:
            dense += scaling * jnp.matmul(factors["lora_B"], factors["lora_A"], precision="highest")
        return dense.astype(dtype)

    return jax.lax.map(merged, (weight, factors))
