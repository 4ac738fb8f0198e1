"""Grouped matmul: sorted rows times one weight per group, for mixtures of experts.

`jax.lax.ragged_dot` is one instruction on a TPU. For CPUs jax 0.10 lowers it to a masked matmul of every row with every
weight. With 32 experts that is 20 to 40 times slower than the loop used here (docs/families.md). The loop visits only
groups that have rows, and runs each in blocks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from difflm_jax.distributed.collectives import varying_with
from difflm_jax.ops.gradients import is_differentiated, values
from difflm_jax.ops.matmul import dense
from difflm_jax.quant.qtensor import QTensor

_BLOCKS = (8, 128)  # minimum and maximum rows of a block
_RESTS = 4  # the rest of a group runs in blocks smaller by this factor, to waste fewer rows

Weight = Any  # array or QTensor [X, out, in]


def grouped_matmul(rows: jax.Array, weights: Sequence[Weight], sizes_X: jax.Array) -> list[jax.Array]:
    """Multiplies rows [M, in] by each of `weights` in one loop. Returns a list of [M, out].

    The first `sizes_X[0]` rows are multiplied by `w[0]` [out, in], the next ones by `w[1]`, and so on. Rows after the
    last group give zeros. Sums are float32, rounded to the dtype of `rows`. A weight has a gradient, in its own dtype,
    if it is differentiated. A frozen one may be quantised, and is decoded one group at a time.
    """
    weights = tuple(w if isinstance(w, QTensor) else varying_with(w, rows) for w in weights)
    rows = varying_with(rows, weights)
    return list(_products(rows, weights, varying_with(sizes_X, rows)))


@jax.custom_vjp
def _products(rows: jax.Array, weights: tuple[Weight, ...], sizes_X: jax.Array) -> tuple[jax.Array, ...]:
    return _grouped((rows,), weights, sizes_X, transposed=False)


def _forward(rows, weights, sizes_X):
    is_trained = [is_differentiated(w) for w in weights]
    rows, weights, sizes_X = values(rows, weights, sizes_X)
    saved = tuple(rows if trained else None for trained in is_trained)
    return _products(rows, weights, sizes_X), (saved, weights, sizes_X)


def _backward(saved, gradients):
    rows, weights, sizes_X = saved
    gradients = tuple(jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in gradients)
    of_weights = tuple(
        None if x is None else _weight_gradient(gradient, x, w, sizes_X)
        for gradient, x, w in zip(gradients, rows, weights, strict=True)
    )
    return _grouped(gradients, weights, sizes_X, transposed=True)[0], of_weights, None


_products.defvjp(_forward, _backward, symbolic_zeros=True)


def _grouped(
    rows: tuple[jax.Array, ...], weights: tuple[Weight, ...], sizes_X: jax.Array, transposed: bool
) -> tuple[jax.Array, ...]:
    """Multiplies one array of rows by each weight; `transposed`: sums each array times its transposed weight."""
    return jax.lax.platform_dependent(
        rows,
        weights,
        sizes_X,
        tpu=functools.partial(_by_instruction, transposed),
        default=functools.partial(_by_loop, transposed),
    )


def _by_instruction(
    transposed: bool, rows: tuple[jax.Array, ...], weights: tuple[Weight, ...], sizes_X: jax.Array
) -> tuple[jax.Array, ...]:
    dtype = rows[0].dtype

    def product(x: jax.Array, w: Weight) -> jax.Array:
        w = dense(w, dtype)
        w = w if transposed else jnp.swapaxes(w, 1, 2)
        return jax.lax.ragged_dot(x, w, sizes_X, preferred_element_type=jnp.float32)

    if transposed:
        found = (sum(product(x, w) for x, w in zip(rows, weights, strict=True)),)
    else:
        found = tuple(product(rows[0], w) for w in weights)
    return tuple(_of_groups(y.astype(dtype), sizes_X) for y in found)


def _by_loop(
    transposed: bool, rows: tuple[jax.Array, ...], weights: tuple[Weight, ...], sizes_X: jax.Array
) -> tuple[jax.Array, ...]:
    length, dtype = len(rows[0]), rows[0].dtype
    block = _block(length, len(sizes_X))
    padded = [jnp.pad(x, ((0, block), (0, 0))) for x in rows]

    def one_block(dense_weights, group, at, count, end, results):
        parts = [jax.lax.dynamic_slice_in_dim(x, at, count) for x in padded]
        if transposed:
            products = [sum(_dot(x, w, (1, 0)) for x, w in zip(parts, dense_weights, strict=True))]
        else:
            products = [_dot(parts[0], w, (1, 1)) for w in dense_weights]
        # Rows written beyond the group are overwritten by the next one.
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(result, y.astype(dtype), at, axis=0)
            for result, y in zip(results, products, strict=True)
        )

    widths = [weights[0].shape[2]] if transposed else [w.shape[1] for w in weights]
    zeros = tuple(varying_with(jnp.zeros((length + block, width), dtype), (rows, weights)) for width in widths)
    results = _over_groups(weights, dtype, sizes_X, block, one_block, zeros)
    return tuple(_of_groups(result[:length], sizes_X) for result in results)


def _weight_gradient(gradient: jax.Array, rows: jax.Array, w: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """[X, out, in] in the dtype of `w`: for each group, the sum over its rows of gradient times input."""
    block = _block(len(rows), len(sizes_X))
    rows, gradient = (jnp.pad(x, ((0, block), (0, 0))) for x in (rows, gradient))

    def one_block(_, group, at, count, end, result):
        x, dy = (jax.lax.dynamic_slice_in_dim(each, at, count) for each in (rows, gradient))
        x = jnp.where((at + jnp.arange(count) < end)[:, None], x, 0)
        own = jax.lax.dynamic_index_in_dim(result, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(result, own + _dot(dy, x, (0, 0)), group, axis=0)

    zeros = varying_with(jnp.zeros(w.shape, jnp.float32), (rows, gradient, w))
    return _over_groups((), None, sizes_X, block, one_block, zeros).astype(w.dtype)


def _over_groups(
    weights: tuple[Weight, ...], dtype: Any, sizes_X: jax.Array, block: int, one_block: Callable[..., Any], result: Any
) -> Any:
    """Folds `one_block(weights, group, first row, rows, end of the group, result)` over all blocks in order."""
    ends = jnp.cumsum(sizes_X)
    with_rows = jnp.argsort(sizes_X == 0, stable=True)

    def one_group(index, result):
        group = with_rows[index]
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, group, keepdims=False), weights)
        dense_weights = [dense(w, dtype) for w in own]
        end, start = ends[group], ends[group] - sizes_X[group]

        def blocks(first, count, number, result):
            def body(index, result):
                return one_block(dense_weights, group, first + index * count, count, end, result)

            return jax.lax.fori_loop(0, number, body, result)

        whole = sizes_X[group] // block
        rest, count = start + whole * block, max(_BLOCKS[0], block // _RESTS)
        return blocks(rest, count, -(-(end - rest) // count), blocks(start, block, whole, result))

    return jax.lax.fori_loop(0, (sizes_X > 0).sum(), one_group, result)


def _of_groups(rows: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """Sets the rows after the last group to zero."""
    return jnp.where((jnp.arange(len(rows)) < sizes_X.sum())[:, None], rows, jnp.zeros((), rows.dtype))


def _block(rows: int, groups: int) -> int:
    """Returns the rows per block: the mean size of a group, rounded up to a power of two, within `_BLOCKS`."""
    least, most = _BLOCKS
    return min(most, max(least, 1 << (max(rows // groups, 1) - 1).bit_length()))


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)
