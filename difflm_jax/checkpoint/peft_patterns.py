"""PEFT's `rank_pattern` and `alpha_pattern`: ranks and scalings of single modules.

Here all projections share one rank and one scaling. A module of lower rank is padded with zeros, and B is multiplied by
the ratio of the scalings, so the update is the same.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import regex

from difflm_jax.checkpoint.peft_modules import PeftModule
from difflm_jax.models.lora import LoraConfig

_SECONDS = 1.0  # longest match of a third-party regular expression, which may take forever


def pattern_problems(values: Mapping[str, Any]) -> list[str]:
    """Returns a message for each fault in the patterns of an `adapter_config.json`."""
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_positive, pattern.values())):
            problems.append(f"{key} must map names of modules to numbers greater than 0")
            continue
        if key == "rank_pattern" and not all(isinstance(rank, int) for rank in pattern.values()):
            problems.append(f"{key} must hold integers")
        for name in pattern:
            try:
                regex.compile(name)
            except regex.error as error:
                problems.append(f"{key}: {str(name)[:60]!r} is no regular expression ({error})")
    return problems


def rank_of(module: PeftModule, layer: int, values: Mapping[str, Any]) -> int:
    """Returns the rank of a module's factors. Raises `ValueError` for a pattern that takes too long to match."""
    return _of_pattern(values, "rank_pattern", module, layer, values["r"])


def scaling_of(module: PeftModule, layer: int, values: Mapping[str, Any]) -> float:
    """Returns the factor of a module's update. Raises `ValueError` as `rank_of` does."""
    alpha = _of_pattern(values, "alpha_pattern", module, layer, values["lora_alpha"])
    rank = rank_of(module, layer, values)
    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=bool(values.get("use_rslora"))).scaling


def widened(pair: tuple[np.ndarray, np.ndarray], rank: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Pads (A, B) with zeros to rank `rank` and multiplies the update by `factor`."""
    A, B = pair
    missing, whole = rank - A.shape[-2], [(0, 0)] * (A.ndim - 2)
    B = B if math.isclose(factor, 1.0, rel_tol=1e-12) else B * np.float32(factor)
    return np.pad(A, (*whole, (0, missing), (0, 0))), np.pad(B, (*whole, (0, 0), (0, missing)))


def _of_pattern(values: Mapping[str, Any], key: str, module: PeftModule, layer: int, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name, as in PEFT, or `default`."""
    name = module.full_name(layer)
    for pattern, value in (values.get(key) or {}).items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", name, timeout=_SECONDS):
                return value
        except TimeoutError as error:
            raise ValueError(f"{key}: {pattern[:60]!r} takes too long to match") from error
    return default


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
