"""The dtypes that a model computes in."""

from pathlib import Path

import jax
import jax.numpy as jnp

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
AUTO = "auto"  # `fastest_dtype` of this machine

_CPU_INFO = Path("/proc/cpuinfo")


def fastest_dtype() -> str:
    """bfloat16 on an accelerator and on a CPU with a matrix unit for it (AMX), else float32.

    If a processor cannot multiply bfloat16, XLA computes in float32 and converts both ways. That is slower: 40 steps of
    SmolLM2-135M on an EPYC with AVX2 took 420 s of CPU time in bfloat16 and 296 s in float32.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    return "bfloat16" if _CPU_INFO.is_file() and "amx_bf16" in _CPU_INFO.read_text().split() else "float32"
