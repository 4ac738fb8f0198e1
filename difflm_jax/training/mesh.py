"""The device mesh. One device is the mesh of size one: there is no other path."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from difflm_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(data: int) -> Mesh:
    """A mesh of `data` devices along the `data` axis; -1 takes every device there is."""
    devices = jax.devices()
    size = len(devices) if data == -1 else data
    if not 1 <= size <= len(devices):
        raise UserError(f"mesh.data={data}: there are {len(devices)} devices")
    return Mesh(np.array(devices[:size]), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the base, the adapters and the optimiser state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [A, B, ...]: micro-batches in sequence, rows over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
