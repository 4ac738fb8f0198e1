"""Checks whether the weights of an opened model fit into memory before they are read. Nothing is traced.

Only weights are counted, so a refused model could not have run. `planning` estimates everything else.
"""

import contextlib
import os
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from difflm_jax.checkpoint.hf import abstract_params, check_quantization
from difflm_jax.checkpoint.source import Source
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig

_GIB = 2**30
_TIGHT = 0.85  # share of the free memory


class OpenModel(Protocol):
    """What is read of a `LanguageModel`, which may be without its weights."""

    source: Source
    model: Transformer
    quantization: QuantConfig | None

    @property
    def config(self) -> ModelConfig: ...


def check_weights(
    lm: OpenModel, flag: str, override: str, is_divided: bool = False, are_trained: bool = False
) -> str | None:
    """Returns a note if the weights leave little free memory, else None. Raises `UserError` if they exceed all memory.

    flag: the flag that selects a quantisation (`--quantization`). override: the flag that loads the model anyway.
    is_divided: weights may be divided over all devices of jax. are_trained: weights are stored as float32 masters.
    """
    dtype = jnp.dtype(jnp.float32 if are_trained else lm.model.dtype)
    parts = _places() if is_divided else 1
    needed, total, free = weight_bytes(lm, dtype, lm.quantization) // parts, total_bytes(), free_bytes()
    if total is not None and needed > total:
        ways = [] if are_trained else _smaller(lm, flag, total * parts)
        advice = f"try {' or '.join(ways)}" if ways else "take a smaller model or a larger machine"
        raise UserError(
            f"{lm.source.name}: will not fit: needs {needed / _GIB:.1f} GiB of {total / _GIB:.1f} for its weights; "
            f"{advice}; {override} loads it all the same"
        )
    if free is not None and needed > _TIGHT * free:
        return f"memory is tight: weights take {needed / _GIB:.1f} GiB of {free / _GIB:.1f} free"
    return None


def weight_bytes(lm: OpenModel, dtype: Any, quantization: QuantConfig | None) -> int:
    """Returns the bytes of the weights of `lm` in this form. A partly quantised checkpoint counts as quantised."""
    leaves = jax.tree.leaves(abstract_params(lm.config, dtype, quantization))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def total_bytes() -> int | None:
    """Returns the bytes that jax can use on the first device; on a CPU, RAM and swap of the host. None: not known."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = _host("MemTotal", "SwapTotal")
    return sum(found) if found else _pages("SC_PHYS_PAGES")


def free_bytes() -> int | None:
    """Returns the bytes that jax can still take on the first device; on a CPU, the host's. None: not known."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    # MemAvailable counts reclaimable page cache as free. Free pages alone would be too few.
    found = _host("MemAvailable")
    return sum(found) if found else _pages("SC_AVPHYS_PAGES")


def _smaller(lm: OpenModel, flag: str, room: int) -> list[str]:
    """Returns the flags that make the weights fit into `room` bytes, the gentlest first."""
    ways = []
    for name in ("int8", "nf4") if lm.quantization is None else ():
        with contextlib.suppress(UserError):
            check_quantization(lm.source, QuantConfig(name))
            if weight_bytes(lm, jnp.dtype(lm.model.dtype), QuantConfig(name)) <= room:
                ways.append(f"{flag}={name}")
    return ways


def _places() -> int:
    """Returns the largest number of memories to divide weights over. CPU devices of a process share one."""
    return jax.process_count() if jax.devices()[0].platform == "cpu" else jax.device_count()


def _host(*names: str) -> list[int]:
    """Returns the bytes of these lines of Linux's /proc/meminfo; empty on other systems."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return []
    return [int(lines[name].split()[0]) * 1024 for name in names if name in lines]


def _pages(name: str) -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)
    except (ValueError, OSError):
        return None
