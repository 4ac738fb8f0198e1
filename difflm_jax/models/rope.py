"""Rotary position embedding: the inverse frequencies of every supported scaling rule, and the rotation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from difflm_jax.errors import UserError

_YARN = (
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
_LONG = ("short_factor", "long_factor")
# Rope type -> its required and its optional keys in `config.json`.
_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "proportional": ((), ("factor",)),
    "yarn": (("factor",), (*_YARN, "llama_4_scaling_beta")),
    "longrope": ((*_LONG, "original_max_position_embeddings"), ("factor", "attention_factor")),
    # HunYuan's: with `alpha` it is fixed and ignores the other keys; without, it would depend on the length
    "dynamic": (("alpha",), ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
}
_HAS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """`theta` and the scaling rule; `options` has the rule's own keys as (name, value) pairs (hashable).

    `partial` is the share of each head that is rotated, from its start. With type "proportional" all elements are
    paired, and `partial` is the share of pairs that are rotated: those with the highest frequencies.
    """

    theta: float
    type: str = "default"
    options: tuple[tuple[str, Any], ...] = ()
    partial: float = 1.0

    @classmethod
    def from_hf(cls, hf: dict[str, Any], has_partial: bool = False, is_longrope: bool = False) -> "RopeConfig":
        """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        As in transformers, `rope_scaling` replaces `rope_parameters`. An `original_max_position_embeddings` of the
        model takes precedence over one inside them. `is_longrope`: any scaling is LongRoPE (Phi-3 called it "su" and
        "yarn"). Raises `UserError` for a rope type, or a key of one, that is not supported.
        """
        scaling = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        legacy_type = scaling.pop("type", None)
        rope_type = scaling.pop("rope_type", None) or legacy_type or "default"
        if is_longrope and rope_type in ("su", "yarn"):
            rope_type = "longrope"
        if rope_type not in _KEYS:
            raise UserError(f"config.json: rope type {rope_type!r} is not supported (known: {', '.join(_KEYS)})")
        partial = scaling.pop("partial_rotary_factor", None)
        partial = hf.get("partial_rotary_factor") if partial is None else partial
        partial = 1.0 if partial is None else partial
        if partial != 1.0 and not has_partial:
            raise UserError(
                f"config.json: partial_rotary_factor other than 1.0 is not supported for {hf.get('model_type')!r}"
            )
        if rope_type in _HAS_ORIGINAL_LENGTH:
            scaling["original_max_position_embeddings"] = _original_length(hf, scaling)
        if rope_type == "yarn":
            scaling.pop("max_position_embeddings", None)  # a copy of the model's
            if "factor" in scaling and scaling["factor"] is None:
                scaling["factor"] = _ratio(hf, scaling)
        if rope_type == "longrope" and scaling.get("factor") is None:
            scaling["factor"] = _ratio(hf, scaling)
        needed, optional = _KEYS[rope_type]
        if missing := [key for key in needed if scaling.get(key) is None]:
            raise UserError(f"config.json: rope type {rope_type!r} needs {', '.join(missing)}")
        if unknown := [key for key in scaling if key not in needed + optional]:
            raise UserError(f"config.json: rope type {rope_type!r} has unknown keys {', '.join(unknown)}")
        for key, value in {"rope_theta": theta, "partial_rotary_factor": partial, **scaling}.items():
            _check_option(key, value)
        options = {k: tuple(map(float, v)) if k in _LONG else v for k, v in scaling.items() if v is not None}
        return cls(float(theta), rope_type, tuple(sorted(options.items())), float(partial))

    def option(self, key: str) -> Any:
        """Returns the value of a key of the rule, or None."""
        return dict(self.options).get(key)

    def rotated(self, head_dim: int) -> int:
        """Returns how many elements of a head are rotated. Raises `UserError` if that number is not even."""
        size = head_dim if self.type == "proportional" else int(head_dim * self.partial)
        if size % 2 or not 0 < size <= head_dim:
            raise UserError(
                f"config.json: partial_rotary_factor={self.partial} of head_dim={head_dim} must be an even number of "
                "elements"
            )
        return size


def _original_length(hf: dict[str, Any], scaling: dict[str, Any]) -> Any:
    beside = hf.get("original_max_position_embeddings")
    inside = scaling.get("original_max_position_embeddings") if beside is None else beside
    return hf.get("max_position_embeddings") if inside is None else inside


def _ratio(hf: dict[str, Any], scaling: dict[str, Any]) -> Any:
    longest, original = hf.get("max_position_embeddings"), scaling["original_max_position_embeddings"]
    _check_option("original_max_position_embeddings", original)
    return longest / original if isinstance(longest, int) and original else None


def _check_option(key: str, value: Any) -> None:
    """Raises `UserError` for a value that no rule can compute with."""
    if value is None or (key == "truncate" and isinstance(value, bool)):
        return
    if key in _LONG:
        if not isinstance(value, list) or not value:
            raise UserError(f"config.json: {key} of the rope must be a list of numbers, not {str(value)[:40]!r}")
        for each in value:
            _check_option(f"each number of {key}", each)
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
    if not number or (key not in ("mscale", "mscale_all_dim") and not value > (key == "rope_theta")):
        raise UserError(f"config.json: {key} of the rope must be a positive number, not {str(value)[:40]!r}")


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns ([R/2] float32 inverse frequencies of the R rotated elements, the factor that scales cos and sin).

    The rules are those of `transformers.modeling_rope_utils`. YaRN is arXiv:2309.00071, LongRoPE arXiv:2402.13753
    (with the factors of short rows), and llama3 the scaling of the Llama 3.1 release.
    """
    options, size = dict(rope.options), rope.rotated(head_dim)
    theta = rope.theta
    if rope.type == "dynamic":
        theta *= options["alpha"] ** (size / (size - 2))
    frequencies = (theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))) ** -1
    if rope.type == "proportional":
        frequencies[int(rope.partial * head_dim // 2) :] = 0.0
        return (frequencies / options.get("factor", 1.0)).astype(np.float32), 1.0
    if rope.type == "linear":
        return (frequencies / options["factor"]).astype(np.float32), 1.0
    if rope.type == "llama3":
        return _llama3(frequencies, options).astype(np.float32), 1.0
    if rope.type == "yarn":
        return _yarn(frequencies, rope.theta, size, options)
    if rope.type == "longrope":
        return _longrope(frequencies, options)
    return frequencies.astype(np.float32), 1.0


def _llama3(frequencies: np.ndarray, options: dict[str, float]) -> np.ndarray:
    original = options["original_max_position_embeddings"]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = original * frequencies / (2 * math.pi)  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / options["factor"] + smooth * frequencies


def _yarn(frequencies: np.ndarray, theta: float, size: int, options: dict[str, float]) -> tuple[np.ndarray, float]:
    factor, original = options["factor"], options["original_max_position_embeddings"]

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = options.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = options.get("mscale"), options.get("mscale_all_dim")
        both = mscale and mscale_all_dim
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim) if both else magnitude()

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(options.get("beta_fast") or 32), dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    span = high - low or 0.001  # avoids division by zero, as the reference does
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / span, 0, 1)
    scaled = frequencies / factor * ramp + frequencies * (1 - ramp)
    return scaled.astype(np.float32), float(attention_factor)


def _longrope(frequencies: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, float]:
    short = np.asarray(options["short_factor"], np.float32)
    if short.shape != frequencies.shape:
        raise UserError(f"config.json: short_factor of the rope must have {len(frequencies)} numbers, not {len(short)}")
    factor, original = options["factor"], options["original_max_position_embeddings"]
    magnitude = options.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return (frequencies / short).astype(np.float32), float(magnitude)


@struct.dataclass
class Rotation:
    """The rotation of the queries and keys of each token, in float32. e is half of the rotated elements of a head.

    cos and sin may have a leading axis [C]: one choice per RoPE of the model, selected by `of_layer`.
    """

    cos: jax.Array  # [B, T, e]
    sin: jax.Array  # [B, T, e]
    query_scale: jax.Array | None = None  # [B, T], scales the queries only

    def of_layer(self, choice: jax.Array | None) -> "Rotation":
        """Returns the rotation of a layer whose RoPE has the index `choice` (None: there is only one)."""
        return self if choice is None else self.replace(cos=self.cos[choice], sin=self.sin[choice])


def rotation(ropes: tuple[RopeConfig | None, ...], head_dim: int, positions_BL: jax.Array) -> Rotation:
    """Returns the rotation at integer `positions_BL`, with a leading axis if there are several `ropes`.

    A rope of None rotates nothing. All ropes must rotate the same number of elements.
    """
    positions_BL1 = positions_BL.astype(jnp.float32)[..., None]
    first = next(rope for rope in ropes if rope is not None)

    def table(rope: RopeConfig | None) -> tuple[jax.Array, jax.Array]:
        frequencies, factor = inverse_frequencies(rope or first, head_dim)
        if rope is None:
            frequencies, factor = np.zeros_like(frequencies), 1.0
        angles = positions_BL1 * frequencies
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    cos, sin = zip(*(table(rope) for rope in ropes), strict=True)
    scale = None
    if (beta := first.option("llama_4_scaling_beta")) is not None:  # arXiv:2501.19399, as in Llama 4
        length = first.option("original_max_position_embeddings")
        scale = 1 + beta * jnp.log1p(jnp.floor(positions_BL.astype(jnp.float32) / length))
    if len(ropes) == 1:
        return Rotation(cos[0], sin[0], scale)
    return Rotation(jnp.stack(cos), jnp.stack(sin), scale)


def rotate(x_BLHE: jax.Array, turn: Rotation, interleaved: bool = False) -> jax.Array:
    """Rotates the first elements of each head in float32; keeps the dtype of `x`.

    A pair is elements i and i + R/2 of the R rotated ones (Hugging Face's layout), or 2i and 2i + 1 if `interleaved`.
    """
    size = 2 * turn.cos.shape[-1]
    part = x_BLHE[..., :size].astype(jnp.float32)
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else jnp.split(part, 2, axis=-1)
    cos, sin = turn.cos[:, :, None], turn.sin[:, :, None]
    halves = first * cos - second * sin, second * cos + first * sin
    rotated = jnp.stack(halves, axis=-1).reshape(part.shape) if interleaved else jnp.concatenate(halves, axis=-1)
    rotated = rotated.astype(x_BLHE.dtype)
    return rotated if size == x_BLHE.shape[-1] else jnp.concatenate([rotated, x_BLHE[..., size:]], axis=-1)
