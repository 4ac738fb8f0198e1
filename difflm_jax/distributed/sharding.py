"""How arrays are sharded over a mesh: specs of parameters and rows, and transfers to and from the devices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from difflm_jax.distributed.collectives import COLUMN_PARALLEL, FSDP, ROW_AXES, ROW_PARALLEL, TENSOR, VOCABULARY_AXES

_TABLES = ("embed_tokens", "lm_head")

Tree = Any


def rows_spec(leading: int = 1) -> PartitionSpec:
    """Returns the spec of arrays whose row axis comes after `leading` undivided axes."""
    return PartitionSpec(*(None,) * leading, ROW_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [A, B, ...]: rows (axis 1) are divided over devices, micro-batches are not."""
    return NamedSharding(mesh, rows_spec())


def specs(tree: Tree, mesh: Mesh) -> Tree:
    """Returns the spec of each leaf of parameters, adapters, or a tree of their structure (Adam's moments).

    Leaves of a layer have the layer axis first.
      - A matrix [N, out, in], dense or a leaf of a quantised one, is divided along its output over `fsdp`, and along
        its output or input over `tensor` (`collectives`). Codes of nested scales are divided over `fsdp` alone.
      - Factors of LoRA and biases are divided over `tensor` alone.
      - Leaves of routed experts are divided along the expert axis over both, and factors of LoRA over `tensor`.
      - Embedding and head are divided along the vocabulary over both.
      - Everything else is replicated.
    An axis of one device divides nothing: gathering a weight from itself would copy it (4 % of a training step on a
    CPU).
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(path, leaf, mesh), tree)


def abstract(tree: Tree, mesh: Mesh) -> Tree:
    """Returns the shapes, dtypes and shardings of `place(tree, mesh)`, from a tree of shapes."""

    def leaf_of(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        spec = _spec(path, leaf, mesh)
        shape = (leaf.shape[0] + _padding(path, leaf, mesh), *leaf.shape[1:]) if leaf.shape else ()
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(leaf_of, tree)


def place(tree: Tree, mesh: Mesh) -> Tree:
    """Places `tree`, the same on every process, on the mesh. Tables are padded so that their rows divide evenly."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _place(path, leaf, mesh), tree)


def place_leaf(path: tuple[str, ...], leaf: Tree, mesh: Mesh) -> Tree:
    """Like `place`, for the leaf or quantised weight at `path` of a tree of parameters."""
    return jax.tree_util.tree_map_with_path(lambda rest, part: _place((*path, *rest), part, mesh), leaf)


def shardings_of(path: tuple[str, ...], leaf: Tree, mesh: Mesh) -> Tree:
    """Returns the shardings of the leaf at `path` of a tree of parameters, in the structure of that leaf."""

    def sharding(rest: tuple[Any, ...], part: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec((*path, *rest), part, mesh))

    return jax.tree_util.tree_map_with_path(sharding, leaf)


def to_mesh(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Shards an array of the host or of one device, the same on every process, according to `sharding`."""
    # An array on a single device without a mesh is moved too. A step returns arrays of the mesh; given the other kind
    # first, it would compile twice.
    on_a_mesh = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
    if on_a_mesh and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = to_host(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(leaf: Any) -> np.ndarray:
    """Returns an array of the mesh (or the host) in whole, on every process. All processes must call this."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def place_rows(tree: Tree, sharding: NamedSharding) -> Tree:
    """Builds arrays of the mesh from host arrays with this process's rows (all rows if there is one process)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def over_rows(function: Callable[..., Tree], mesh: Mesh | None, variables: Tree, *rows: Any) -> Tree:
    """Calls `function(variables, *rows)` on the mesh, with `rows` and the results divided along axis 0.

    `variables` are the model's collections. If `mesh` is None, this is a plain call.
    """
    if mesh is None:
        return function(variables, *rows)
    along_rows = rows_spec(leading=0)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(specs(variables, mesh), *(along_rows for _ in rows)), out_specs=along_rows
    )
    return mapped(variables, *rows)


def rows_of_process(mesh: Mesh, count: int) -> np.ndarray:
    """Returns the ascending indices of this process's rows, out of the `count` rows of a micro-batch."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((1, count)).values()
    return np.unique(np.concatenate([np.arange(count)[rows] for _, rows in indices]))


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> PartitionSpec:
    def divided(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | str | None:
        several = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[axis] > 1)
        return several if len(several) > 1 else next(iter(several), None)

    parts = [divided(axes) for axes in _axes(path, leaf)]
    return PartitionSpec(*parts) if any(parts) else PartitionSpec()


def _axes(path: tuple[Any, ...], leaf: Any) -> tuple[str | tuple[str, ...] | None, ...]:
    """Returns, for each axis of a leaf, the axes of the mesh over which it is divided."""
    names = _names(path)
    module = next((name for name in names if name in COLUMN_PARALLEL + ROW_PARALLEL), None)
    is_factor = "lora_A" in names or "lora_B" in names
    column, ndim = module in COLUMN_PARALLEL, len(leaf.shape)
    if _is_table(path):
        return (VOCABULARY_AXES, None)
    if "experts" in names:
        return (None, TENSOR if is_factor else (TENSOR, FSDP))
    if module is None:
        return ()
    if "lora_A" in names:
        return () if column else (None, None, TENSOR)
    if "lora_B" in names:
        return (None, TENSOR, None) if column else ()
    if "bias" in names:
        return (None, TENSOR) if column else ()
    if ndim < 3:  # scales of scales
        return ()
    if "scales" in names and names[-1] == "codes":
        return (None, FSDP, None)
    return (None, (TENSOR, FSDP), None) if column else (None, FSDP, TENSOR)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def _is_table(path: tuple[Any, ...]) -> bool:
    return any(name in _TABLES for name in _names(path))


def _padding(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> int:
    """Returns how many rows to pad a table with, so that its rows divide evenly; 0 for other leaves."""
    return -leaf.shape[0] % math.prod(mesh.shape[axis] for axis in VOCABULARY_AXES) if _is_table(path) else 0


def _place(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> jax.Array:
    if padding := _padding(path, leaf, mesh):
        leaf = jnp.pad(leaf, ((0, padding), (0, 0)))
    return to_mesh(leaf, NamedSharding(mesh, _spec(path, leaf, mesh)))
