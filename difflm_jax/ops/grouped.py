"""Products of sorted rows with one weight for each group of them: the experts of a mixture.

`jax.lax.ragged_dot` is one instruction on a TPU. For CPUs jax 0.10 lowers it to a product of every row with every
weight, behind a mask: 20 to 40 times slower with 32 experts than the loop used here (docs/families.md). The loop visits
the groups that have rows, and runs each in blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.distributed.collectives import varying_with
from difflm_jax.ops.gradients import is_differentiated, values
from difflm_jax.ops.matmul import dense
from difflm_jax.quant.qtensor import QTensor

_BLOCKS = (8, 128)  # the least and the most rows of a block
_RESTS = 4  # blocks of that fraction take what is left of a group, so that less of them is empty

Weight = Any  # array or QTensor [X, out, in]


def grouped_matmul(rows: jax.Array, w: Weight, sizes_X: jax.Array) -> jax.Array:
    """Rows [M, in], the first `sizes_X[0]` of them times `w[0]` [out, in], the next ones times `w[1]`, ...: [M, out].

    Sums are made in float32 and rounded to the dtype of `rows`. Rows after the last group give zeros. `w` has a
    gradient if it is differentiated, in its own dtype; a frozen one may be quantised, and one group of it is decoded at
    a time.
    """
    w = w if isinstance(w, QTensor) else varying_with(w, rows)
    rows = varying_with(rows, w)
    return _product(rows, w, varying_with(sizes_X, rows))


@jax.custom_vjp
def _product(rows: jax.Array, w: Weight, sizes_X: jax.Array) -> jax.Array:
    return _grouped(rows, w, sizes_X, transposed=False)


def _forward(rows, w, sizes_X):
    is_trained = is_differentiated(w)
    rows, w, sizes_X = values(rows, w, sizes_X)
    return _product(rows, w, sizes_X), (rows if is_trained else None, w, sizes_X)


def _backward(saved, gradient):
    rows, w, sizes_X = saved
    of_rows = _grouped(gradient, w, sizes_X, transposed=True)
    return of_rows, None if rows is None else _weight_gradient(gradient, rows, w, sizes_X), None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _grouped(rows: jax.Array, w: Weight, sizes_X: jax.Array, transposed: bool) -> jax.Array:
    """The product with each weight, or with its transpose."""
    return jax.lax.platform_dependent(
        rows,
        w,
        sizes_X,
        tpu=functools.partial(_by_instruction, transposed),
        default=functools.partial(_by_loop, transposed),
    )


def _by_instruction(transposed: bool, rows: jax.Array, w: Weight, sizes_X: jax.Array) -> jax.Array:
    w = dense(w, rows.dtype)
    y = jax.lax.ragged_dot(
        rows, w if transposed else jnp.swapaxes(w, 1, 2), sizes_X, preferred_element_type=jnp.float32
    )
    return _of_groups(y.astype(rows.dtype), sizes_X)


def _by_loop(transposed: bool, rows: jax.Array, w: Weight, sizes_X: jax.Array) -> jax.Array:
    block = _block(len(rows), len(sizes_X))
    padded = jnp.pad(rows, ((0, block), (0, 0)))
    over = (1, 0 if transposed else 1)

    def one_block(weight, group, at, count, end, result):
        y = _dot(jax.lax.dynamic_slice_in_dim(padded, at, count), weight, over).astype(rows.dtype)
        # What is written beyond the group is overwritten by the next one.
        return jax.lax.dynamic_update_slice_in_dim(result, y, at, axis=0)

    zeros = jnp.zeros((len(padded), w.shape[2 if transposed else 1]), rows.dtype)
    result = _over_groups(w, rows.dtype, sizes_X, block, one_block, varying_with(zeros, (rows, w)))
    return _of_groups(result[: len(rows)], sizes_X)


def _weight_gradient(gradient: jax.Array, rows: jax.Array, w: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """[X, out, in] in the dtype of `w`: of each group the sum over its rows of gradient times input."""
    block = _block(len(rows), len(sizes_X))
    rows, gradient = (jnp.pad(x, ((0, block), (0, 0))) for x in (rows, gradient))

    def one_block(_, group, at, count, end, result):
        x, dy = (jax.lax.dynamic_slice_in_dim(each, at, count) for each in (rows, gradient))
        x = jnp.where((at + jnp.arange(count) < end)[:, None], x, 0)
        own = jax.lax.dynamic_index_in_dim(result, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(result, own + _dot(dy, x, (0, 0)), group, axis=0)

    zeros = varying_with(jnp.zeros(w.shape, jnp.float32), (rows, gradient, w))
    return _over_groups(None, None, sizes_X, block, one_block, zeros).astype(w.dtype)


def _over_groups(
    w: Weight | None, dtype: Any, sizes_X: jax.Array, block: int, one_block: Callable[..., jax.Array], result: jax.Array
) -> jax.Array:
    """`result` after `one_block(weight, group, first row, rows, end of the group, result)` of every block, in order."""
    ends = jnp.cumsum(sizes_X)
    with_rows = jnp.argsort(sizes_X == 0, stable=True)

    def one_group(index, result):
        group = with_rows[index]
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, group, keepdims=False), w)
        weight = None if w is None else dense(own, dtype)
        end, start = ends[group], ends[group] - sizes_X[group]

        def blocks(first, count, number, result):
            def body(index, result):
                return one_block(weight, group, first + index * count, count, end, result)

            return jax.lax.fori_loop(0, number, body, result)

        whole = sizes_X[group] // block
        rest, count = start + whole * block, max(_BLOCKS[0], block // _RESTS)
        return blocks(rest, count, -(-(end - rest) // count), blocks(start, block, whole, result))

    return jax.lax.fori_loop(0, (sizes_X > 0).sum(), one_group, result)


def _of_groups(rows: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """`rows` with zeros after the last group."""
    return jnp.where((jnp.arange(len(rows)) < sizes_X.sum())[:, None], rows, jnp.zeros((), rows.dtype))


def _block(rows: int, groups: int) -> int:
    """Rows of a block: as many as a group has on average, as a power of two."""
    least, most = _BLOCKS
    return min(most, max(least, 1 << (max(rows // groups, 1) - 1).bit_length()))


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)
