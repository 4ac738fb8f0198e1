"""Checks whether a model will fit into the free memory before its weights are read, and what to change if not.

The estimate is that of `difflm plan`, for a model that was opened without its weights.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.checkpoint.hf import check_quantization
from difflm_jax.checkpoint.memory import free_bytes
from difflm_jax.config.files import load_config
from difflm_jax.distributed.mesh import abstract_mesh
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.planning.chips import GIB
from difflm_jax.planning.estimate import device_bytes, sampling_estimate
from difflm_jax.planning.jobs import Generation, sampling_job
from difflm_jax.quant import QuantConfig

_TIGHT = 0.85  # share of the free memory
_ONE_DEVICE = (1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Bytes that a generation needs on one device, by part, and the bytes that are free there (None: not known)."""

    parts: dict[str, int]
    free: int | None

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def verdict(self) -> str:
        """ "fits", "tight", or "will not fit"."""
        if self.free is None or self.needed <= _TIGHT * self.free:
            return "fits"
        return "tight" if self.needed <= self.free else "will not fit"

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size >= 0.05 * GIB)
        of = "" if self.free is None else f" of {self.free / GIB:.1f} free"
        return f"{self.verdict}: needs {self.needed / GIB:.1f} GiB{of}" + (f" ({parts})" if parts else "")


def generation_fit(lm: LanguageModel, rows: int, columns: int) -> Fit:
    """Returns the fit of `lm`, opened without weights, for `rows` rows of `columns` tokens (half of them prompt)."""
    config = load_config()
    with config.unlocked():
        config.update(_described(lm))
    platform = jax.default_backend()
    answer = max(columns // 2, 1)
    given = Generation(rows, columns - answer, answer, answer, lm.block_length or None)
    job = sampling_job(config, lm.config, abstract_mesh(*_ONE_DEVICE), given, platform == "cpu")
    kind = platform if platform in ("cpu", "tpu") else "cuda"
    parts = sampling_estimate(config, lm.config, _ONE_DEVICE, kind, job).parts
    return Fit({**parts, "adapters": device_bytes(lm.lora)}, free_bytes())


def check_fit(lm: LanguageModel, rows: int, columns: int, override: str) -> str | None:
    """Returns a note if memory is tight, else None. Raises `UserError` with advice if the model will not fit.

    override: the flag that loads the model anyway, for the message.
    """
    fit = generation_fit(lm, rows, columns)
    if fit.verdict != "will not fit":
        return f"memory is {fit}" if fit.verdict == "tight" else None
    ways = [flag for flag, other in _smaller(lm, rows, columns) if generation_fit(*other).verdict != "will not fit"]
    advice = f"try {' or '.join(ways)}" if ways else "take a smaller model or a larger machine"
    raise UserError(f"{lm.source.name}: {fit}; {advice}; {override} loads it all the same")


def _described(lm: LanguageModel) -> dict[str, Any]:
    """Returns the keys of a config that describe `lm`."""
    stored = lm.quantization
    keys = {
        "dtype": jnp.dtype(lm.model.dtype).name,
        "attention": lm.attention,
        "block_length": lm.block_length,
        "algorithm": lm.algorithm,
        "trained": "adapter",
        "quantization": stored.format if stored else "",
    }
    if stored:
        keys |= {"quantization_block_size": stored.block_size, "double_quantization": stored.double_quant}
    return keys


def _smaller(lm: LanguageModel, rows: int, columns: int) -> list[tuple[str, tuple[LanguageModel, int, int]]]:
    """Returns (flag, arguments of `generation_fit` with it) for ways to need less memory, the gentlest first."""
    ways = []
    if rows > 1:
        ways.append((f"--rows={max(rows // 4, 1)}", (lm, max(rows // 4, 1), columns)))
    if columns > 512:
        ways.append((f"--max_length={columns // 4}", (lm, rows, columns // 4)))
    for name in ("int8", "nf4") if lm.quantization is None else ():
        stored = QuantConfig(name)
        with contextlib.suppress(UserError):
            check_quantization(lm.source, stored)
            ways.append((f"--quantization={name}", (dataclasses.replace(lm, quantization=stored), rows, columns)))
    return ways
