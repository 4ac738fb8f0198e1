"""Matmuls of few rows with weights left in their stack over layers, in C++ on CPUs (`few_rows.cc`, `beside.cc`).

XLA's CPU backend copies each layer's weights out of their stack before it multiplies, and first decodes a quantised
weight into memory. With few rows these copies take most of a pass. The C++ functions read weights, and cached keys and
values, in place and in their own format.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from difflm_jax.quant.nested import NestedScales
from difflm_jax.quant.qtensor import QTensor, dequantize
from difflm_jax.utils.native import has_native

# Maximum rows of a pass. With more rows, XLA is as fast for dense weights and for weights that it decodes first.
MAX_DENSE_ROWS, MAX_ROWS = 32, 96
MIN_WEIGHTS = 1 << 14  # values in a layer's weight; smaller ones are not worth a call

_PRODUCT, _ATTENTION = "difflm_few_rows", "difflm_attend_beside"
_FUNCTIONS = {"few_rows.cc": _PRODUCT, "beside.cc": _ATTENTION}
LANES = 16
_FORMATS = {"float32": 0, "bfloat16": 1, "nf4": 2, "int4": 3, "int8": 4}
_PLAIN, _HALF, _NESTED = range(3)


@struct.dataclass
class InStack:
    """One weight [out, in] of a stack [N, out, in], dense or quantised, without a copy."""

    stack: jax.Array | QTensor
    index: jax.Array  # [], int32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def taken(self) -> jax.Array | QTensor:
        """Returns a copy of the weight."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.index, 0, False), self.stack)


def is_available() -> bool:
    """Whether matmuls can read weights in their stack here: on a CPU, with a C++ compiler for the first use."""
    here = Path(__file__).parent
    return jax.default_backend() == "cpu" and all(has_native(here / name, (of,)) for name, of in _FUNCTIONS.items())


def suits(stack: Any, rows: int) -> bool:
    """Whether these functions are faster than XLA for `rows` rows and weights like those of `stack`."""
    if isinstance(stack, QTensor):
        fits, most = stack.codes.ndim == 3 and stack.block_size % (2 * LANES) == 0, MAX_ROWS
    else:
        fits = stack.ndim == 3 and stack.dtype.name in _FORMATS and stack.shape[-1] % LANES == 0
        most = MAX_DENSE_ROWS
    return fits and rows <= most and stack.shape[1] * stack.shape[2] >= MIN_WEIGHTS


@struct.dataclass
class Updates:
    """Low-rank updates scaling * up (down x) of weights that share an input: (down, up) or None for each weight.

    down [rank, in] and up [out, rank] are float32. `gate` is bool [R, 1], or [R, rank] for a gate per inner value. If
    it is False, the row's result is exactly that without the update.
    """

    factors: Sequence[tuple[InStack, InStack] | None]
    gate: jax.Array
    scaling: float = struct.field(pytree_node=False)


def product(x_RD: jax.Array, w: InStack, dtype: Any = jnp.float32) -> jax.Array:
    """Multiplies `x` [R, in] by `w` [out, in] -> [R, out] in `dtype`. Sums are float32; `x` is read in its own dtype.

    A quantised weight has the values of `dequantize` in the dtype of `x`. A row's result does not depend on the number
    of rows.
    """
    return products(x_RD, [w], None, dtype)[0]


def products(
    x_RD: jax.Array, weights: Sequence[InStack], updates: Updates | None = None, dtype: Any = None
) -> list[jax.Array]:
    """`product` with several weights of one layer and their low-rank updates; `dtype` defaults to that of `x`."""
    leaves, attributes = [], []
    for number, w in enumerate(weights):
        own = updates and updates.factors[number]
        parts, described = _operands(w.stack)
        leaves += parts + [factor.stack for factor in own or ()]
        attributes.append((*described, own[0].shape[0] if own else 0))
    dtype = jnp.dtype(dtype or x_RD.dtype)
    gate = jnp.zeros((len(x_RD), 1), bool) if updates is None else updates.gate
    if x_RD.dtype not in (jnp.float32, jnp.bfloat16):
        x_RD = x_RD.astype(jnp.float32)
    named = zip(("formats", "scales", "groups", "ranks"), np.array(attributes, np.int64).T, strict=True)
    return jax.ffi.ffi_call(_PRODUCT, [jax.ShapeDtypeStruct((x_RD.shape[0], w.shape[0]), dtype) for w in weights])(
        x_RD,
        weights[0].index.astype(jnp.int32)[None],
        gate,
        *leaves,
        **{name: np.ascontiguousarray(values) for name, values in named},
        scaling=np.float32(updates.scaling if updates else 1.0),
    )


def attend_beside(
    q_BTHE: jax.Array,
    columns_BKSE: tuple[InStack, InStack],
    rows_BTKE: tuple[jax.Array, jax.Array],
    mask_BTS: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """`ops.attention.attend_beside` without sinks, reading cached keys and values [N, B, K, S, E] in their stacks.

    Reads only columns that the mask allows. Computes in float32 throughout.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q_BTHE, *rows_BTKE))
    keys, values = columns_BKSE
    call = jax.ffi.ffi_call(_ATTENTION, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    y_BTHE = call(
        q,
        keys.index.astype(jnp.int32)[None],
        keys.stack,
        values.stack,
        k,
        v,
        mask_BTS,
        scale=np.float32(q.shape[-1] ** -0.5),
        softcap=np.float32(softcap or 0.0),
    )
    return y_BTHE.astype(q_BTHE.dtype)


def reference(x_RD: jax.Array, w: InStack) -> jax.Array:
    """Computes `product` with XLA."""
    taken = w.taken()
    dense = dequantize(taken, x_RD.dtype) if isinstance(taken, QTensor) else taken
    return jax.lax.dot_general(x_RD.astype(jnp.float32), dense.astype(jnp.float32), (((1,), (1,)), ((), ())))


def _operands(stack: jax.Array | QTensor) -> tuple[list[jax.Array], tuple[int, int, int]]:
    """Returns (the leaves of a stack, (its format, the kind of its scales, inputs per scale))."""
    if not isinstance(stack, QTensor):
        return [stack], (_FORMATS[stack.dtype.name], _PLAIN, 0)
    own = stack.scales
    if isinstance(own, NestedScales):
        scales, leaves = _NESTED, [stack.codes, own.codes, own.absmax, own.offset, own.code_map]
    else:
        scales, leaves = _HALF if own.dtype == jnp.bfloat16 else _PLAIN, [stack.codes, own]
    return leaves, (_FORMATS[stack.format], scales, stack.block_size)
