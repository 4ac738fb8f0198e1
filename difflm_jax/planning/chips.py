"""Accelerators by name: memory, speed, links, and descriptions that let XLA compile for absent ones."""

import dataclasses
import math
import re
from typing import Any

from jax.experimental import topologies

from difflm_jax.errors import UserError, one_line
from difflm_jax.models.flops import peak_flops

GIB = 2**30
_GB_OF_APPLE = re.compile(r"m(\d{1,3})")  # m16: an Apple M-series with 16 GB


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Sizes are in bytes and speeds in bytes per second, from the data sheets of Google and NVIDIA.

    usable: share of the memory that jax takes by default. link: what a device receives from the others of its machine
    or slice, in one direction.
    """

    name: str
    memory: int
    usable: float
    flops: float | None  # dense bfloat16 FLOP/s; None if not known
    bandwidth: float | None
    link: float | None
    platform: str  # tpu, cuda or cpu


_TPU_USABLE, _GPU_USABLE = 0.98, 0.75  # TPU: less the compiler's share; GPU: jax's default fraction

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * GIB, _TPU_USABLE, peak_flops("TPU v5e"), 819e9, 200e9, "tpu"),
        Chip("v6e", 32 * GIB, _TPU_USABLE, peak_flops("TPU v6e"), 1640e9, 400e9, "tpu"),
        Chip("a100", 80 * GIB, _GPU_USABLE, peak_flops("NVIDIA A100"), 2039e9, 300e9, "cuda"),
        Chip("h100", 84_942_979_072, _GPU_USABLE, peak_flops("NVIDIA H100"), 3352e9, 450e9, "cuda"),
        Chip("l4", 24_152_899_584, _GPU_USABLE, peak_flops("NVIDIA L4"), 300e9, 32e9, "cuda"),
        Chip("t4", 15_835_660_288, _GPU_USABLE, 8.1e12, 320e9, 16e9, "cuda"),  # no bfloat16 unit: float32
        Chip("3090", 25_438_126_080, _GPU_USABLE, peak_flops("NVIDIA GeForce RTX 3090"), 936e9, 32e9, "cuda"),
        Chip("4090", 25_386_352_640, _GPU_USABLE, peak_flops("NVIDIA GeForce RTX 4090"), 1008e9, 32e9, "cuda"),
        Chip("h200", 150_754_820_096, _GPU_USABLE, peak_flops("NVIDIA H200"), 4800e9, 450e9, "cuda"),
    )
}


def apple_chip(name: str) -> Chip | None:
    """Returns an Apple M-series by its memory (`m16`: 16 GB), on which jax uses the CPU; None for another name."""
    found = _GB_OF_APPLE.fullmatch(name)
    return Chip(name, int(found[1]) * GIB, 0.75, None, None, None, "cpu") if found else None


# XLA's GpuTargetConfig, which it needs to compile for an absent GPU. Values are from NVIDIA's data sheets and CUDA's
# table of compute capabilities.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
_HOPPER = {"shared": 233472, "optin": 232448, "cores": 132, "fpus": 128, "clock": 1.98, "major": 9, "cache": 52428800}
_AMPERE = {"shared": 167936, "optin": 166912, "cores": 108, "fpus": 64, "clock": 1.41, "major": 8, "cache": 41943040}
_GPUS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", **_HOPPER},
    "h200": {"name": "NVIDIA H200", **_HOPPER},
    "a100": {"name": "NVIDIA A100-SXM4-80GB", **_AMPERE},
}
_TPU_SLICES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def absent_devices(chip: Chip, count: int) -> list[Any]:
    """Returns `count` devices of an absent kind, to compile for.

    Raises `UserError` if the compiler for them is not installed, or if the GPU or the size of the slice is unknown.
    """
    if chip.platform == "cuda" and chip.name not in _GPUS:
        raise UserError(f"--compile: what XLA must know of {chip.name} is not known (only of {', '.join(_GPUS)})")
    try:
        if chip.platform == "tpu":
            size = min((size for size in _TPU_SLICES if size >= count), default=None)
            if size is None:
                raise UserError(f"--compile: no slice of {count} {chip.name} chips is known (at most 256)")
            topology = f"{chip.name}:{_TPU_SLICES[size]}"
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)[:count]
        target = _TARGET.format(bandwidth=int(chip.bandwidth), memory=math.floor(chip.memory), **_GPUS[chip.name])
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target, topology=f"1x1x{count}"
        )
        return list(described.devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        needed = "jax[tpu]" if chip.platform == "tpu" else "jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12"
        raise UserError(
            f"--compile: the compiler for {chip.name} cannot be used ({one_line(error)[:160]}); it needs {needed}"
        ) from error
