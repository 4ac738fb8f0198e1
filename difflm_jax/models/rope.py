"""Rotary position embedding: the inverse frequencies of every scaling rule we know, and the rotation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.errors import UserError

# Rope type -> the keys it needs and the keys it may have, as `config.json` spells them.
_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """`theta` and the scaling rule; `options` holds the rule's own keys as (name, value) pairs (hashable)."""

    theta: float
    type: str = "default"
    options: tuple[tuple[str, float | bool], ...] = ()

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "RopeConfig":
        """Reads `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        Raises `UserError` for a rope type, or a key of one, that is not represented here.
        """
        scaling = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        legacy_type = scaling.pop("type", None)
        rope_type = scaling.pop("rope_type", None) or legacy_type or "default"
        if rope_type not in _KEYS:
            raise UserError(f"config.json: rope type {rope_type!r} is not supported (known: {', '.join(_KEYS)})")
        if scaling.pop("partial_rotary_factor", 1.0) != 1.0 or hf.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("config.json: partial_rotary_factor other than 1.0 is not supported")
        needed, optional = _KEYS[rope_type]
        if rope_type == "yarn" and scaling.get("original_max_position_embeddings") is None:
            scaling["original_max_position_embeddings"] = hf.get("max_position_embeddings")
        if missing := [key for key in needed if scaling.get(key) is None]:
            raise UserError(f"config.json: rope type {rope_type!r} needs {', '.join(missing)}")
        if unknown := [key for key in scaling if key not in needed + optional]:
            raise UserError(f"config.json: rope type {rope_type!r} has unknown keys {', '.join(unknown)}")
        for key, value in {"rope_theta": theta, **scaling}.items():
            _check_option(key, value)
        return cls(float(theta), rope_type, tuple(sorted((k, v) for k, v in scaling.items() if v is not None)))


def _check_option(key: str, value: Any) -> None:
    """Raises `UserError` for what no rule can calculate with."""
    if value is None or (key == "truncate" and isinstance(value, bool)):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
    if not number or (key not in ("mscale", "mscale_all_dim") and not value > (key == "rope_theta")):
        raise UserError(f"config.json: {key} of the rope must be a positive number, not {str(value)[:40]!r}")


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns ([E/2] float32 inverse frequencies, the factor that scales cos and sin).

    The rules are those of `transformers.modeling_rope_utils`; YaRN is arXiv:2309.00071, llama3 the scaling of the
    Llama 3.1 release.
    """
    options = dict(rope.options)
    frequencies = (rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))) ** -1
    if rope.type == "linear":
        return (frequencies / options["factor"]).astype(np.float32), 1.0
    if rope.type == "llama3":
        return _llama3(frequencies, options).astype(np.float32), 1.0
    if rope.type == "yarn":
        return _yarn(frequencies, rope.theta, head_dim, options)
    return frequencies.astype(np.float32), 1.0


def _llama3(frequencies: np.ndarray, options: dict[str, float]) -> np.ndarray:
    original = options["original_max_position_embeddings"]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = original * frequencies / (2 * math.pi)  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / options["factor"] + smooth * frequencies


def _yarn(frequencies: np.ndarray, theta: float, head_dim: int, options: dict[str, float]) -> tuple[np.ndarray, float]:
    factor, original = options["factor"], options["original_max_position_embeddings"]

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = options.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = options.get("mscale"), options.get("mscale_all_dim")
        both = mscale and mscale_all_dim
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim) if both else magnitude()

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(options.get("beta_fast") or 32), dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low or 0.001  # as the reference, against division by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    scaled = frequencies / factor * ramp + frequencies * (1 - ramp)
    return scaled.astype(np.float32), float(attention_factor)


def rope_tables(rope: RopeConfig, head_dim: int, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B, L, E/2] float32, at integer `positions_BL`."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    angles = positions_BL.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BLHE: jax.Array, cos_BLe: jax.Array, sin_BLe: jax.Array) -> jax.Array:
    """Rotates the two halves of each head (Hugging Face's layout) in float32; keeps the dtype of `x`."""
    first, second = jnp.split(x_BLHE.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLe[:, :, None], sin_BLe[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHE.dtype)
