"""Products of few rows with what stays in its stack over layers, by C++ functions on CPUs (`few_rows.cc`, `beside.cc`).

XLA's CPU backend copies each layer's weights out of their stack before it multiplies, and decodes a quantised weight
into memory first. With few rows that takes most of a pass: the rest is one read of the weights. The functions read
weights, and cached keys and values, in place and in their own format.
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

# Rows of a pass. Beyond, XLA multiplies dense weights as fast, and weights that it decodes first.
MAX_DENSE_ROWS, MAX_ROWS = 32, 96
MIN_WEIGHTS = 1 << 14  # of a layer; smaller ones are not worth a call

_PRODUCT, _ATTENTION = "difflm_few_rows", "difflm_attend_beside"
_FUNCTIONS = {"few_rows.cc": _PRODUCT, "beside.cc": _ATTENTION}
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
    here = Path(__file__).parent
    return jax.default_backend() == "cpu" and all(has_native(here / name, (of,)) for name, of in _FUNCTIONS.items())


def suits(stack: Any, rows: int) -> bool:
    """Whether the product of `rows` rows with weights like those of `stack` is faster so."""
    if isinstance(stack, QTensor):
        fits, most = stack.codes.ndim == 3 and stack.block_size % (2 * LANES) == 0, MAX_ROWS
    else:
        fits = stack.ndim == 3 and stack.dtype.name in _FORMATS and stack.shape[-1] % LANES == 0
        most = MAX_DENSE_ROWS
    return fits and rows <= most and stack.shape[1] * stack.shape[2] >= MIN_WEIGHTS


@struct.dataclass
class Updates:
    """Low-rank updates scaling * up (down x) of weights that share an input; of a weight (down, up) or None.

    down [rank, in] and up [out, rank] are float32. `gate` bool [R, 1], or [R, rank] where it is that of each inner
    value: False leaves the row of `x` exactly as it is without the update.
    """

    factors: Sequence[tuple[InStack, InStack] | None]
    gate: jax.Array
    scaling: float = struct.field(pytree_node=False)


def product(x_RD: jax.Array, w: InStack, dtype: Any = jnp.float32) -> jax.Array:
    """`x` [R, in] times `w` [out, in] -> [R, out] in `dtype`, summed in float32 from values of `x` in its own.

    A quantised weight has the values that `dequantize` gives it in the dtype of `x`. A row's result does not depend on
    how many rows there are.
    """
    return products(x_RD, [w], None, dtype)[0]


def products(
    x_RD: jax.Array, weights: Sequence[InStack], updates: Updates | None = None, dtype: Any = None
) -> list[jax.Array]:
    """`product` with each of several weights of one layer, with their low-rank updates; `dtype`: that of `x`."""
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


def _operands(stack: jax.Array | QTensor) -> tuple[list[jax.Array], tuple[int, int, int]]:
    """(the leaves of a stack, its format, the kind of its scales, the inputs that share one)."""
    if not isinstance(stack, QTensor):
        return [stack], (_FORMATS[stack.dtype.name], _PLAIN, 0)
    own = stack.scales
    if isinstance(own, NestedScales):
        scales, leaves = _NESTED, [stack.codes, own.codes, own.absmax, own.offset, own.code_map]
    else:
        scales, leaves = _HALF if own.dtype == jnp.bfloat16 else _PLAIN, [stack.codes, own]
    return leaves, (_FORMATS[stack.format], scales, stack.block_size)
