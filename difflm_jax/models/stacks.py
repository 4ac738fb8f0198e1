"""Weights of projections left in their stack over layers, for passes over few rows on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.distributed.collectives import COLUMN_PARALLEL, DATA, FSDP, ROW_PARALLEL, TENSOR, axes_of
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.ops import few_rows
from difflm_jax.ops.cpu import bits_of
from difflm_jax.quant.qtensor import QTensor

_PROJECTIONS = (*COLUMN_PARALLEL, *ROW_PARALLEL)


def stay_in_stacks(model: Transformer, x: jax.Array, rows: int) -> bool:
    """Whether `ops.few_rows` serves passes of `model` over `rows` tokens. `x`, which has them, is on one device."""
    is_divided = axes_of(x, (DATA, FSDP, TENSOR)) != ()
    return model.on_cpu and not is_divided and rows <= few_rows.MAX_ROWS and few_rows.is_available()


def in_stacks(variables: dict[str, Any], config: ModelConfig, rows: int) -> dict[str, Any]:
    """`variables` for a pass over `rows` tokens, with projections and cached columns in their stacks where that is
    faster.

    The collection `stacks` has the stacks; `params` and `columns` have the indices of layers in their place.
    """
    params, columns, stacks = dict(variables["params"]), dict(variables.get("columns", {})), {}
    params["embed_tokens"] = bits_of(params["embed_tokens"])  # else XLA makes a float32 copy of it to read a few rows
    reads_columns = rows <= few_rows.MAX_DENSE_ROWS and config.head_dim % few_rows.LANES == 0 and not config.sinks
    for name, _, _ in config.stacks:
        params[name], stacks[name] = _divided(params[name], rows)
        if columns and reads_columns:
            cached = columns[name]["self_attn"]
            stacks[name]["self_attn"] = {**stacks[name].get("self_attn", {}), **cached}
            columns[name] = {"self_attn": jax.tree.map(_indices, cached)}
    return {**variables, "params": params, "columns": columns, "stacks": stacks}


def _divided(module: dict[str, Any], rows: int, name: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    own, stacks = {}, {}
    for key, value in module.items():
        if isinstance(value, dict):
            own[key], stacks[key] = _divided(value, rows, key)
        elif key == "weight" and name in _PROJECTIONS and few_rows.suits(value, rows):
            own[key], stacks[key] = _indices(value.codes if isinstance(value, QTensor) else value), value
        else:
            own[key] = value
    return own, {key: value for key, value in stacks.items() if not isinstance(value, dict) or value}


def _indices(stack: jax.Array) -> jax.Array:
    return jnp.arange(len(stack), dtype=jnp.int32)
