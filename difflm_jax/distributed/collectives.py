"""What devices exchange where weights are divided over them. Without a mesh, and on one device, nothing.

The axes are those of `difflm_jax.distributed.mesh`.
  - Rows of a batch are divided over `data` and `fsdp`.
  - Matrices are divided over `fsdp` along their output rows, as stored, and gathered where a layer uses them.
  - Heads and MLP are divided over `tensor`: q, k, v, gate and up along their output; o and down along their input,
    whose results are summed.
  - Routed experts are divided over `tensor` and `fsdp` whole: those of `fsdp` are gathered where a layer uses them, and
    the results of those of `tensor` are summed.
  - Embedding and output head are divided along the vocabulary over `fsdp` and `tensor`. Hidden states and tokens
    travel; the table does not.

How an array is divided is read from its type: inside `jax.shard_map` it names the axes along which devices hold
different values. So the model has one path for every mesh, and knows of none.
"""

from typing import Any

import jax
import jax.numpy as jnp

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
ROW_AXES = (DATA, FSDP)
VOCABULARY_AXES = (FSDP, TENSOR)  # fsdp-major: the order of the blocks of vocabulary rows
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")


def varies(x: Any, axis: str) -> bool:
    """Whether devices along `axis` hold different values of `x`."""
    return axis in jax.typeof(x).manual_axis_type.varying


def divided(x: Any, axis: str) -> bool:
    """Whether `x` is one of several parts along `axis`: an axis of one device divides nothing."""
    return varies(x, axis) and jax.lax.axis_size(axis) > 1


def axes_of(x: Any, among: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of `among` along which `x` differs, in their order."""
    return tuple(axis for axis in among if varies(x, axis))


def gathered(weight: Any) -> Any:
    """A weight of one layer (an array, or a pytree of packed codes and scales) whole along `fsdp`.

    Only matrices are divided: every leaf of two dimensions along its output rows, the last axis but one.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or not divided(leaf, FSDP):
            return leaf
        return jax.lax.all_gather(leaf, FSDP, axis=leaf.ndim - 2, tiled=True)

    return jax.tree.map(gather, weight)


def gathered_experts(weight: Any) -> Any:
    """The experts of one layer (every leaf has their axis first) that this device has along `tensor`: its own ones and
    those of the other devices along `fsdp`."""

    def gather(leaf: jax.Array) -> jax.Array:
        return jax.lax.all_gather(leaf, FSDP, axis=0, tiled=True) if divided(leaf, FSDP) else leaf

    return jax.tree.map(gather, weight)


def own_experts(weight: Any, count: int) -> tuple[jax.Array | int, int]:
    """(the first, how many) of `count` experts that `gathered_experts` gives this device."""
    leaf = jax.tree.leaves(weight)[0]
    if not divided(leaf, TENSOR):
        return 0, count
    count //= jax.lax.axis_size(TENSOR)
    return jax.lax.axis_index(TENSOR) * count, count


def varying_with(x: jax.Array, weight: Any) -> jax.Array:
    """Casts `x` to vary over every mesh axis that `weight` varies over, as `custom_vjp` requires.

    The gradient of this cast is the sum over those axes.
    """
    axes = {axis for leaf in jax.tree.leaves(weight) for axis in axes_of(leaf, (DATA, FSDP, TENSOR))}
    missing = tuple(axis for axis in (DATA, FSDP, TENSOR) if axis in axes and not varies(x, axis))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def summed(x: jax.Array) -> jax.Array:
    """The sum over `tensor` of partial results; `x` itself where they are whole."""
    return jax.lax.psum(x, TENSOR) if varies(x, TENSOR) else x


def own_heads(weight: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """This device's part, of `shape`, along the first axis of a small weight that every device has whole."""
    if weight.shape == shape:
        return weight
    return jax.lax.dynamic_slice_in_dim(weight, jax.lax.axis_index(TENSOR) * shape[0], shape[0])


def mean_of_heads(x: jax.Array, is_divided: bool) -> jax.Array:
    """The mean over the last axis, kept; over that axis of all devices along `tensor` if `is_divided`."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return jax.lax.pmean(mean, TENSOR) if is_divided else mean


def everywhere(flag: jax.Array) -> jax.Array:
    """bool []: whether `flag` is true on all devices, which must agree on it in loops that contain communication."""
    axes = axes_of(flag, (DATA, FSDP, TENSOR))
    return jax.lax.pmin(flag.astype(jnp.int32), axes) > 0 if axes else flag


def largest(count: jax.Array) -> jax.Array:
    """The largest `count` of any device."""
    axes = axes_of(count, (DATA, FSDP, TENSOR))
    return jax.lax.pmax(count, axes) if axes else count


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows [B, T, D] of a table that may be divided along its rows."""
    axes = _parts_of(table_VD)
    if not axes:
        return table_VD[tokens_BT]
    at_BT = rows_together(tokens_BT, table_VD) - first_row(table_VD)
    here = (at_BT >= 0) & (at_BT < table_VD.shape[0])
    x_BTD = jnp.where(here[..., None], table_VD[jnp.where(here, at_BT, 0)], 0)
    return rows_apart(x_BTD, table_VD)


def first_row(table_VD: jax.Array) -> jax.Array:
    """Index in the vocabulary of the first row that this device holds."""
    index = 0
    for axis in _parts_of(table_VD):
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index * table_VD.shape[0]


def rows_together(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """`x` of all devices that share a divided table along `fsdp`, joined along axis 0."""
    return jax.lax.all_gather(x, FSDP, axis=0, tiled=True) if divided(table_VD, FSDP) else x


def rows_apart(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """The inverse of `rows_together`: sums partial results over the parts of the table; each device gets its rows."""
    if divided(table_VD, TENSOR):
        x = jax.lax.psum(x, TENSOR)
    return jax.lax.psum_scatter(x, FSDP, scatter_dimension=0, tiled=True) if divided(table_VD, FSDP) else x


def own_rows(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """This device's part along axis 0 of an array that all devices sharing a table have computed alike."""
    if not divided(table_VD, FSDP):
        return x
    count = x.shape[0] // jax.lax.axis_size(FSDP)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(FSDP) * count, count)


def over_vocabulary(reduce: Any, x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """`reduce` (`jax.lax.psum`, `pmax` or `pmin`) of `x` over the devices that share a divided table."""
    axes = _parts_of(table_VD)
    return reduce(x, axes) if axes else x


def whole_vocabulary(logits_BTV: jax.Array, table_VD: jax.Array, vocab_size: int) -> jax.Array:
    """[B, T, V] logits of this device's rows, from the logits of all rows for its part of the vocabulary."""
    parts = logits_BTV
    if divided(table_VD, TENSOR):  # not an all-gather: its result would count as differing over `tensor`
        size, width = jax.lax.axis_size(TENSOR), parts.shape[-1]
        wide = jnp.zeros((*parts.shape[:-1], size * width), parts.dtype)
        wide = jax.lax.pcast(wide, axes_of(parts, (DATA, FSDP, TENSOR)), to="varying")
        start = jax.lax.axis_index(TENSOR) * width
        parts = jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(wide, parts, start, axis=-1), TENSOR)
    if divided(table_VD, FSDP):
        parts = jax.lax.all_to_all(parts, FSDP, split_axis=0, concat_axis=parts.ndim - 1, tiled=True)
    return parts[..., :vocab_size]


def _parts_of(table_VD: jax.Array) -> tuple[str, ...]:
    """The axes along which a table is divided."""
    return tuple(axis for axis in VOCABULARY_AXES if divided(table_VD, axis))
