"""Leaves the weights of projections in their stacks over layers, for passes over few rows on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.distributed.collectives import DATA, FSDP, TENSOR, axes_of
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.ops import few_rows
from difflm_jax.ops.cpu import bits_of
from difflm_jax.quant.qtensor import QTensor

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # by input


def stay_in_stacks(model: Transformer, x: jax.Array, rows: int) -> bool:
    """Whether passes of `model` over `rows` tokens can use `ops.few_rows`. Requires `x`, their input, on one device."""
    is_divided = axes_of(x, (DATA, FSDP, TENSOR)) != ()
    return model.on_cpu and not is_divided and rows <= few_rows.MAX_ROWS and few_rows.is_available()


def in_stacks(variables: dict[str, Any], config: ModelConfig, rows: int) -> dict[str, Any]:
    """Returns `variables` for a pass over `rows` tokens, with stacks left whole where that is faster.

    This applies to projections, their low-rank factors and cached columns. The collection `stacks` has the stacks;
    `params`, `lora` and `columns` have the indices of layers instead.
    """
    params, columns = dict(variables["params"]), dict(variables.get("columns", {}))
    lora, stacks = dict(variables.get("lora", {})), {}
    params["embed_tokens"] = bits_of(params["embed_tokens"])  # else XLA copies it to float32 to read a few rows
    for stack in config.stacks:
        name, heads = stack.name, config.of_stack(stack).head_dim
        reads_columns = rows <= few_rows.MAX_DENSE_ROWS and heads % few_rows.LANES == 0 and not config.sinks
        params[name], factors, stacks[name] = _divided(params[name], lora.get(name, {}), rows)
        if name in lora:
            lora[name] = factors
        if columns and reads_columns:
            cached = columns[name]["self_attn"]
            stacks[name]["self_attn"] = {**stacks[name].get("self_attn", {}), **cached}
            columns[name] = {"self_attn": jax.tree.map(_indices, cached)}
    divided = {**variables, "params": params, "columns": columns, "stacks": stacks}
    return {**divided, "lora": lora} if "lora" in variables else divided


def _divided(params: dict[str, Any], lora: dict[str, Any], rows: int) -> tuple[dict[str, Any], ...]:
    """Returns (params, lora, stacks) of a module. Projections of one input stay in stacks together or not at all."""
    params, lora, stacks = dict(params), dict(lora), {}
    for group in GROUPS:
        names = [name for name in group if name in params]
        if names and all(_suits(params[name], lora.get(name, {}), rows) for name in names):
            for name in names:
                stacks[name] = {"weight": params[name]["weight"], **lora.get(name, {})}
                params[name] = {**params[name], "weight": _indices(params[name]["weight"])}
                if name in lora:
                    lora[name] = jax.tree.map(_indices, lora[name])
    for name, value in params.items():
        if isinstance(value, dict) and not any(name in group for group in GROUPS):
            params[name], factors, own = _divided(value, lora.get(name, {}), rows)
            if name in lora:
                lora[name] = factors
            if own:
                stacks[name] = own
    return params, lora, stacks


def _suits(params: dict[str, Any], lora: dict[str, Any], rows: int) -> bool:
    factors = jax.tree.leaves(lora)
    return (
        "weight" in params and few_rows.suits(params["weight"], rows) and all(x.dtype == jnp.float32 for x in factors)
    )


def _indices(stack: jax.Array | QTensor) -> jax.Array:
    """Returns the indices [N] int32 of the layers of a stack."""
    return jnp.arange(len(jax.tree.leaves(stack)[0]), dtype=jnp.int32)
