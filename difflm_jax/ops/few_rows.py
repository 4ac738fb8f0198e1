"""Products of few rows with what stays in its stack over layers, by C++ functions on CPUs (`few_rows.cc`).

XLA's CPU backend copies each layer's weights out of their stack before it multiplies, and decodes a quantised weight
into memory first. With few rows that takes most of a pass: the rest is one read of the weights. The functions read
weights, and cached keys and values, in place and in their own format.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from difflm_jax.quant.nested import NestedScales
from difflm_jax.quant.qtensor import QTensor, dequantize
from difflm_jax.utils.native import has_native

# Rows of a pass. Beyond, XLA multiplies dense weights as fast, and weights that it decodes first.
MAX_DENSE_ROWS, MAX_ROWS = 32, 96
MIN_WEIGHTS = 1 << 14  # of a layer; smaller ones are not worth a call

_SOURCE, _PRODUCT, _ATTENTION = Path(__file__).with_suffix(".cc"), "difflm_few_rows", "difflm_attend_beside"
LANES = 16
_FORMATS = {"float32": 0, "bfloat16": 1, "nf4": 2, "int4": 3, "int8": 4}
_PLAIN, _HALF, _NESTED = range(3)


@struct.dataclass
class InStack:
    """One weight [out, in] of a stack [N, out, in], dense or quantised, which is not copied out of it."""

    stack: jax.Array | QTensor
    index: jax.Array  # [], int32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def taken(self) -> jax.Array | QTensor:
        """A copy of the weight."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.index, 0, False), self.stack)


def is_available() -> bool:
    """Whether products of few rows can stay in the stack here: on a CPU, with a C++ compiler the first time."""
    return jax.default_backend() == "cpu" and has_native(_SOURCE, (_PRODUCT, _ATTENTION))


def suits(stack: Any, rows: int) -> bool:
    """Whether the product of `rows` rows with weights like those of `stack` is faster so."""
    if isinstance(stack, QTensor):
        fits, most = stack.codes.ndim == 3 and stack.block_size % (2 * LANES) == 0, MAX_ROWS
    else:
        fits = stack.ndim == 3 and stack.dtype.name in _FORMATS and stack.shape[-1] % LANES == 0
        most = MAX_DENSE_ROWS
    return fits and rows <= most and stack.shape[1] * stack.shape[2] >= MIN_WEIGHTS


def product(x_RD: jax.Array, w: InStack) -> jax.Array:
    """float32 `x` [R, in] times `w` [out, in] -> [R, out], from values of `x` in its dtype.

    A quantised weight has the values that `dequantize` gives it in the dtype of `x`. A row's result does not depend on
    how many rows there are.
    """
    leaves, attributes = _operands(w.stack, x_RD.dtype)
    result = jax.ShapeDtypeStruct((x_RD.shape[0], w.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(_PRODUCT, result)
    return call(x_RD.astype(jnp.float32), w.index.astype(jnp.int32)[None], *leaves, **attributes)


def attend_beside(
    q_BTHE: jax.Array,
    columns_BKSE: tuple[InStack, InStack],
    rows_BTKE: tuple[jax.Array, jax.Array],
    mask_BTS: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """`ops.attention.attend_beside` without sinks, with cached keys and values [N, B, K, S, E] left in their stacks.

    Reads what the mask lets it see. Computes in float32 throughout.
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
    """What `product` gives, by XLA."""
    taken = w.taken()
    dense = dequantize(taken, x_RD.dtype) if isinstance(taken, QTensor) else taken
    return jax.lax.dot_general(x_RD.astype(jnp.float32), dense.astype(jnp.float32), (((1,), (1,)), ((), ())))


def _operands(stack: jax.Array | QTensor, dtype: Any) -> tuple[list[jax.Array], dict[str, Any]]:
    if not isinstance(stack, QTensor):
        format_, scales, group, leaves = stack.dtype.name, _PLAIN, 0, [stack]
    else:
        format_, group, own = stack.format, stack.block_size, stack.scales
        if isinstance(own, NestedScales):
            scales, leaves = _NESTED, [stack.codes, own.codes, own.absmax, own.offset, own.code_map]
        else:
            scales, leaves = _HALF if own.dtype == jnp.bfloat16 else _PLAIN, [stack.codes, own]
    return leaves, {
        "format": np.int64(_FORMATS[format_]),
        "scales": np.int64(scales),
        "group": np.int64(group),
        "rounds": np.bool_(dtype == jnp.bfloat16),
    }
