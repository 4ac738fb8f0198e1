"""The dtypes that a model computes in."""

from pathlib import Path

import jax
import jax.numpy as jnp

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
AUTO = "auto"  # `fastest_dtype` of this machine

_CPU_INFO = Path("/proc/cpuinfo")
_MULTIPLY_BFLOAT16 = {"amx_bf16", "avx512_bf16"}


def fastest_dtype() -> str:
    """Returns "bfloat16" on an accelerator and on a CPU with AMX or AVX512_BF16, else "float32".

    If a CPU cannot multiply bfloat16, XLA computes in float32 and converts both ways, which is slower. 40 steps of
    SmolLM2-135M on an EPYC with AVX2 took 420 s of CPU time in bfloat16 and 296 s in float32. ARM's bfloat16
    instructions were not measured, so ARM uses float32.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    features = set(_CPU_INFO.read_text().split()) if _CPU_INFO.is_file() else set()
    return "bfloat16" if features & _MULTIPLY_BFLOAT16 else "float32"
