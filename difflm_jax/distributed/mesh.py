"""The device mesh `data` x `fsdp` x `tensor`, and how everything lies on it. One device is the mesh of size one.

What divides over which axis, and what the model does about it, is told in `difflm_jax.distributed.collectives`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from difflm_jax.distributed.collectives import (
    COLUMN_PARALLEL,
    DATA,
    FSDP,
    ROW_AXES,
    ROW_PARALLEL,
    TENSOR,
    VOCABULARY_AXES,
)
from difflm_jax.errors import UserError

AXES = (DATA, FSDP, TENSOR)
_TABLES = ("embed_tokens", "lm_head")

Tree = Any


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of `data` x `fsdp` x `tensor` devices of all processes; one of them may be -1: what is left.

    `tensor` varies fastest, so that the devices that talk most are neighbours, of one host where there are as many.
    """
    devices = jax.devices()
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    written = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"{written}: only one of them can be what is left (-1)")
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    count = math.prod(sizes.values())
    if not 1 <= count <= len(devices):
        raise UserError(f"{written}: there are {len(devices)} devices")
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(f"{written}: several processes need a mesh of all {len(devices)} devices")
    return Mesh(np.array(devices[:count]).reshape(*sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def rows_spec(leading: int = 1) -> PartitionSpec:
    """Of arrays whose rows come behind `leading` undivided axes."""
    return PartitionSpec(*(None,) * leading, ROW_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [A, B, ...]: micro-batches in sequence, rows over the devices."""
    return NamedSharding(mesh, rows_spec())


def specs(tree: Tree, mesh: Mesh) -> Tree:
    """How parameters, adapters and whatever has their structure (Adam's moments) lie on the mesh, leaf by leaf.

    Leaves of a layer have the layer axis first. A matrix [N, out, in], dense or a leaf of a quantised one, is divided
    along its output over `fsdp`, and over `tensor` along its output or input as `collectives` says; a factor of
    LoRA over `tensor` alone; everything else is replicated. Nested scales are whole along `tensor`. An axis of one
    device divides nothing: it would cost a copy of every weight, gathered from itself (4 % of a step on a CPU).
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(path, leaf, mesh), tree)


def abstract(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes, dtypes and shardings of what `place` makes of a tree of such shapes."""

    def leaf_of(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        spec = _spec(path, leaf, mesh)
        shape = (leaf.shape[0] + _padding(path, leaf, mesh), *leaf.shape[1:]) if leaf.shape else ()
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(leaf_of, tree)


def place(tree: Tree, mesh: Mesh) -> Tree:
    """`tree` (the same on every process) on the mesh. Tables are padded so that their rows divide."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _place(path, leaf, mesh), tree)


def place_leaf(path: tuple[str, ...], leaf: Tree, mesh: Mesh) -> Tree:
    """`place` of the leaf, or the quantised weight, at `path` of a tree of parameters."""
    return jax.tree_util.tree_map_with_path(lambda rest, part: _place((*path, *rest), part, mesh), leaf)


def shardings_of(path: tuple[str, ...], leaf: Tree, mesh: Mesh) -> Tree:
    """Where the leaf at `path` of a tree of parameters lies on the mesh, with a sharding in place of each array."""

    def sharding(rest: tuple[Any, ...], part: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec((*path, *rest), part, mesh))

    return jax.tree_util.tree_map_with_path(sharding, leaf)


def to_mesh(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array of the host or of one device, the same on every process, divided as `sharding` says."""
    # An array that lies on one device, but on no mesh, is put there even so: what a step returns is on the mesh, and a
    # step that is given one and then the other is traced and compiled twice.
    on_a_mesh = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
    if on_a_mesh and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = to_host(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(leaf: Any) -> np.ndarray:
    """All of an array of the mesh (or of the host), on every process (which must all ask for it)."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def place_rows(tree: Tree, sharding: NamedSharding) -> Tree:
    """Arrays of the host that hold this process's rows, or on one process all, as arrays of the mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def over_rows(function: Callable[..., Tree], mesh: Mesh | None, variables: Tree, *rows: Any) -> Tree:
    """`function(variables, *rows)`, whose arguments behind the first and whose results have rows first, on the mesh.

    `variables` are the model's collections. Without a mesh it is the plain call.
    """
    if mesh is None:
        return function(variables, *rows)
    along_rows = rows_spec(leading=0)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(specs(variables, mesh), *(along_rows for _ in rows)), out_specs=along_rows
    )
    return mapped(variables, *rows)


def rows_of_process(mesh: Mesh, count: int) -> np.ndarray:
    """Which of the `count` rows of a micro-batch this process holds: ascending, all of them on a single process."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((1, count)).values()
    return np.unique(np.concatenate([np.arange(count)[rows] for _, rows in indices]))


def rows_of_all(mesh: Mesh, local: int) -> int:
    """How many rows a micro-batch has of which this process holds `local`."""
    parts = len({rows.start for _, rows in batch_sharding(mesh).addressable_devices_indices_map(
        (1, row_shards(mesh))).values()})  # fmt: skip
    return local * row_shards(mesh) // parts


def is_writer() -> bool:
    """Whether this is the process that writes what is written once: logs, metrics, what a phase trained."""
    return jax.process_index() == 0


def agreed(here: bool) -> bool:
    """Whether something holds in every process (which must all ask)."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


def wait_for_all(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def by_one_process(write: Callable[[], None], what: str) -> None:
    """Process 0 calls `write`, the others wait for it; where it fails, it fails in all of them.

    `what` is written, for the message of those that wait. Raises what `write` raises, elsewhere `UserError`.
    """
    error = None
    if is_writer():
        try:
            write()
        except Exception as found:
            error = found
    if not agreed(error is None):
        raise error or UserError(f"{what}: process 0 could not write it, and says why")


def check_model(config: Any, block_size: int, mesh: Mesh) -> None:
    """Raises `UserError` where a model (its `ModelConfig`) does not divide over the mesh.

    `block_size` is that of a quantised base, 1 for another: a block is not divided.
    """
    tensor, fsdp = mesh.shape[TENSOR], mesh.shape[FSDP]
    for key, size in (("num_key_value_heads", config.num_kv_heads), ("intermediate_size", config.intermediate_size)):
        if size % tensor:
            raise UserError(f"mesh.tensor={tensor} does not divide the model's {key}={size}")
    for name, size in (("o_proj", config.num_heads * config.head_dim), ("down_proj", config.intermediate_size)):
        if size // tensor % block_size:
            raise UserError(
                f"mesh.tensor={tensor} does not divide the {size // block_size} blocks of {block_size} inputs of {name}"
            )
    outputs = {
        "q_proj": config.num_heads * config.head_dim // tensor,
        "k_proj": config.num_kv_heads * config.head_dim // tensor,
        "gate_proj": config.intermediate_size // tensor,
        "o_proj": config.hidden_size,
    }
    for name, size in outputs.items():
        if size % fsdp:
            raise UserError(f"mesh.fsdp={fsdp} does not divide the {size} outputs that a device has of {name}")


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> PartitionSpec:
    def divided(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | str | None:
        several = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[axis] > 1)
        return several if len(several) > 1 else next(iter(several), None)

    parts = [divided(axes) for axes in _axes(path, leaf)]
    return PartitionSpec(*parts) if any(parts) else PartitionSpec()


def _axes(path: tuple[Any, ...], leaf: Any) -> tuple[str | tuple[str, ...] | None, ...]:
    """The axes of the mesh over which each axis of a leaf is divided."""
    names = _names(path)
    module = next((name for name in names if name in COLUMN_PARALLEL + ROW_PARALLEL), None)
    column, ndim = module in COLUMN_PARALLEL, len(leaf.shape)
    if _is_table(path):
        return (VOCABULARY_AXES, None)
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
    """Rows that a table needs behind its own, so that they divide."""
    return -leaf.shape[0] % math.prod(mesh.shape[axis] for axis in VOCABULARY_AXES) if _is_table(path) else 0


def _place(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> jax.Array:
    if padding := _padding(path, leaf, mesh):
        leaf = jnp.pad(leaf, ((0, padding), (0, 0)))
    return to_mesh(leaf, NamedSharding(mesh, _spec(path, leaf, mesh)))
