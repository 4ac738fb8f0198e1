"""Whether the weights of a model that was opened have room here, before they are read. Nothing is traced.

Only weights are counted, so what is refused could not run. What needs more than weights is for `fit` and `plan` to say.
"""

import contextlib
import os
from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.checkpoint.hf import abstract_params, check_quantization
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.quant import QuantConfig

_GIB = 2**30
_TIGHT = 0.85  # of what is free


def check_weights(
    lm: LanguageModel, flag: str, override: str, is_divided: bool = False, are_trained: bool = False
) -> str | None:
    """A note where the weights leave little of what is free. Raises `UserError` where they exceed all that there is.

    `flag` is what names a quantisation (`--quantization`), `override` the flag that loads the model all the same.
    `is_divided`: over devices; they may then be all that jax has. `are_trained`: held as float32 masters.
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


def weight_bytes(lm: LanguageModel, dtype: Any, quantization: QuantConfig | None) -> int:
    """Bytes of the weights of `lm`, held so. A checkpoint that is stored quantised in part counts as quantised."""
    leaves = jax.tree.leaves(abstract_params(lm.config, dtype, quantization))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def total_bytes() -> int | None:
    """Bytes that the first device can ever give to jax; for a CPU those of the host, swap included. None: not known."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = _host("MemTotal", "SwapTotal")
    return sum(found) if found else _pages("SC_PHYS_PAGES")


def free_bytes() -> int | None:
    """Bytes of the first device that are free: what jax may still take, or for a CPU what the host has."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    # Linux's own estimate counts the page cache as free; the free pages alone would be too few.
    found = _host("MemAvailable")
    return sum(found) if found else _pages("SC_AVPHYS_PAGES")


def _smaller(lm: LanguageModel, flag: str, room: int) -> list[str]:
    """Flags that make the weights fit into `room` bytes, the gentlest first."""
    ways = []
    for name in ("int8", "nf4") if lm.quantization is None else ():
        with contextlib.suppress(UserError):
            check_quantization(lm.source, QuantConfig(name))
            if weight_bytes(lm, jnp.dtype(lm.model.dtype), QuantConfig(name)) <= room:
                ways.append(f"{flag}={name}")
    return ways


def _places() -> int:
    """Memories over which weights can be divided at most; the CPU devices of a process share the host's."""
    return jax.process_count() if jax.devices()[0].platform == "cpu" else jax.device_count()


def _host(*names: str) -> list[int]:
    """Bytes of these lines of Linux's /proc/meminfo; none elsewhere."""
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
