"""What devices exchange if weights are divided over them. Without a mesh, and on one device, nothing is exchanged.

The axes are those of `difflm_jax.distributed.mesh`.
  - Rows of a batch are divided over `data` and `fsdp`.
  - Matrices are divided over `fsdp` along their output rows, in stored form, and gathered in the layer that uses them.
  - Heads and MLP are divided over `tensor`: q, k, v, gate and up along their output, o and down along their input. The
    results of o and down are summed.
  - Routed experts are divided over `tensor` and `fsdp`, each expert whole. They are gathered over `fsdp` in the layer
    that uses them; their results are summed over `tensor`.
  - Embedding and output head are divided along the vocabulary over `fsdp` and `tensor`. Hidden states and tokens are
    exchanged; the tables are not.

The type of an array says how it is divided: inside `jax.shard_map` it names the axes along which devices have different
values. So the model code is the same for every mesh and never refers to one.
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
    """Whether devices along `axis` may have different values of `x`."""
    return axis in jax.typeof(x).manual_axis_type.varying


def divided(x: Any, axis: str) -> bool:
    """Whether `x` is one of several parts along `axis`. An axis of one device divides nothing."""
    return varies(x, axis) and jax.lax.axis_size(axis) > 1


def axes_of(x: Any, among: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the axes of `among` along which `x` varies, in their order."""
    return tuple(axis for axis in among if varies(x, axis))


def gathered(weight: Any) -> Any:
    """Gathers a weight of one layer (an array, or a pytree of packed codes and scales) over `fsdp`.

    Only matrices are divided: leaves with two or more dimensions, along their output rows (axis -2).
    """

    def gather(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or not divided(leaf, FSDP):
            return leaf
        return jax.lax.all_gather(leaf, FSDP, axis=leaf.ndim - 2, tiled=True)

    return jax.tree.map(gather, weight)


def gathered_experts(weight: Any) -> Any:
    """Gathers over `fsdp` the experts of one layer that belong to this device's part of `tensor`.

    The first axis of every leaf is that of the experts.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        return jax.lax.all_gather(leaf, FSDP, axis=0, tiled=True) if divided(leaf, FSDP) else leaf

    return jax.tree.map(gather, weight)


def own_experts(weight: Any, count: int) -> tuple[jax.Array | int, int]:
    """Returns (index of the first, number) of those of `count` experts that `gathered_experts` gives this device."""
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
    """Sums partial results over `tensor`; returns `x` unchanged if it does not vary over `tensor`."""
    return jax.lax.psum(x, TENSOR) if varies(x, TENSOR) else x


def own_heads(weight: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns this device's part, of `shape`, along axis 0 of a small weight that is whole on every device."""
    if weight.shape == shape:
        return weight
    return jax.lax.dynamic_slice_in_dim(weight, jax.lax.axis_index(TENSOR) * shape[0], shape[0])


def mean_of_heads(x: jax.Array, is_divided: bool) -> jax.Array:
    """Returns the mean over the last axis, keeping the axis; over all devices along `tensor` too if `is_divided`."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return jax.lax.pmean(mean, TENSOR) if is_divided else mean


def everywhere(flag: jax.Array) -> jax.Array:
    """Returns bool []: whether `flag` is true on all devices. Loops that communicate need the same condition on all."""
    axes = axes_of(flag, (DATA, FSDP, TENSOR))
    return jax.lax.pmin(flag.astype(jnp.int32), axes) > 0 if axes else flag


def largest(count: jax.Array) -> jax.Array:
    """Returns the largest `count` over all devices."""
    axes = axes_of(count, (DATA, FSDP, TENSOR))
    return jax.lax.pmax(count, axes) if axes else count


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Returns the rows [B, T, D] of `tokens_BT` from a table that may be divided along its rows."""
    axes = _parts_of(table_VD)
    if not axes:
        return table_VD[tokens_BT]
    at_BT = rows_together(tokens_BT, table_VD) - first_row(table_VD)
    here = (at_BT >= 0) & (at_BT < table_VD.shape[0])
    x_BTD = jnp.where(here[..., None], table_VD[jnp.where(here, at_BT, 0)], 0)
    return rows_apart(x_BTD, table_VD)


def first_row(table_VD: jax.Array) -> jax.Array:
    """Returns the index in the vocabulary of the first row on this device."""
    index = 0
    for axis in _parts_of(table_VD):
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index * table_VD.shape[0]


def rows_together(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Gathers `x` along axis 0 over `fsdp` if the table is divided there; else returns it unchanged."""
    return jax.lax.all_gather(x, FSDP, axis=0, tiled=True) if divided(table_VD, FSDP) else x


def rows_apart(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Sums partial results over the parts of the table and gives each device its rows: undoes `rows_together`."""
    if divided(table_VD, TENSOR):
        x = jax.lax.psum(x, TENSOR)
    return jax.lax.psum_scatter(x, FSDP, scatter_dimension=0, tiled=True) if divided(table_VD, FSDP) else x


def own_rows(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Returns this device's rows (axis 0) of an array that is equal on all devices that share a divided table."""
    if not divided(table_VD, FSDP):
        return x
    count = x.shape[0] // jax.lax.axis_size(FSDP)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(FSDP) * count, count)


def over_vocabulary(reduce: Any, x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Reduces `x` with `reduce` (`jax.lax.psum`, `pmax` or `pmin`) over the devices that share a divided table."""
    axes = _parts_of(table_VD)
    return reduce(x, axes) if axes else x


def whole_vocabulary(logits_BTV: jax.Array, table_VD: jax.Array, vocab_size: int) -> jax.Array:
    """Returns logits [B, T, V] of this device's rows, given the logits of all rows for its part of the vocabulary."""
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
    """Returns the axes of the mesh over which a table is divided."""
    return tuple(axis for axis in VOCABULARY_AXES if divided(table_VD, axis))
