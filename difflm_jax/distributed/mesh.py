"""The device mesh `data` x `fsdp` x `tensor`. A single device is a mesh of size one.

`sharding` says how arrays are divided over it, `collectives` what its devices exchange, `processes` how hosts join it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from difflm_jax.distributed.collectives import DATA, FSDP, ROW_AXES, TENSOR
from difflm_jax.errors import UserError

AXES = (DATA, FSDP, TENSOR)
AnyMesh = Mesh | AbstractMesh


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Builds a mesh of `data` x `fsdp` x `tensor` devices of all processes. One size may be -1: all devices left.

    `tensor` varies fastest. So the devices that communicate most are neighbours, on one host if it has enough. Raises
    `UserError` for sizes that do not match the devices.
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
    shape = tuple(sizes.values())
    if count == len(devices) and len({getattr(device, "slice_index", 0) for device in devices}) == 1:
        return mesh_of(by_links(devices, shape))
    return mesh_of(np.array(devices[:count]).reshape(shape))


def mesh_of(devices: np.ndarray) -> Mesh:
    """Builds the mesh of an array of devices [data, fsdp, tensor]."""
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def by_links(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Arranges the devices of one slice in `shape` so that each axis of the mesh follows links of the torus."""
    # Not `jax.make_mesh`: it refuses a shape that splits an axis of the slice, as 2,4,2 does on 4x4 chips.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """Builds a mesh of these sizes without devices."""
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: AnyMesh) -> int:
    """Returns the number of parts that the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_model(config: Any, block_size: int, mesh: Mesh) -> None:
    """Raises `UserError` if a model (its `ModelConfig`) does not divide evenly over the mesh.

    block_size: that of a quantised base, else 1. A quantisation block is never divided.
    """
    tensor, fsdp = mesh.shape[TENSOR], mesh.shape[FSDP]
    if config.experts is not None and config.experts.count % (tensor * fsdp):
        raise UserError(
            f"mesh.tensor={tensor} and mesh.fsdp={fsdp} do not divide the model's {config.experts.count} experts"
        )
    mlp = _mlp_width(config)
    heads = () if config.global_heads is None else (("num_global_key_value_heads", config.global_heads.number),)
    for key, size in (("num_key_value_heads", config.num_kv_heads), *heads, ("intermediate_size", mlp)):
        if size % tensor:
            raise UserError(f"mesh.tensor={tensor} does not divide the model's {key}={size}")
    for name, size in (("o_proj", config.num_heads * config.head_dim), ("down_proj", mlp)):
        if size // tensor % block_size:
            raise UserError(
                f"mesh.tensor={tensor} does not divide the {size // block_size} blocks of {block_size} inputs of {name}"
            )
    outputs = {
        "q_proj": config.num_heads * config.head_dim // tensor,
        "k_proj": config.num_kv_heads * config.head_dim // tensor,
        "up_proj": mlp // tensor,
        "o_proj": config.hidden_size,
    }
    for name, size in outputs.items():
        if size % fsdp:
            raise UserError(f"mesh.fsdp={fsdp} does not divide the {size} outputs that a device has of {name}")


def _mlp_width(config: Any) -> int:
    """Returns the greatest common divisor of the widths of dense MLPs and shared experts; 0 if there are neither."""
    experts = config.experts
    if experts is None:
        return config.intermediate_size
    widths = [experts.shared_width, 0 if all(experts.sparse) else config.intermediate_size]
    return math.gcd(*widths)
