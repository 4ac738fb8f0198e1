"""Double quantisation (arXiv:2305.14314, section 3): the scales of a weight are themselves quantised to 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from difflm_jax.quant.nf4 import TINY

BLOCK = 256  # scales that share one scale of their own, as in bitsandbytes


@struct.dataclass
class NestedScales:
    """Scales stored as code_map[codes] * absmax[i // 256] + offset; i numbers a weight's scales in row-major order.

    A value of `absmax` may cover scales of two rows, so `absmax` is never sharded along the rows of a weight.
    """

    codes: jax.Array  # uint8 [..., out, in / G]
    absmax: jax.Array  # float32 [..., ceil(out * in / G / 256)]
    offset: jax.Array  # float32 [...], the mean of the scales
    code_map: jax.Array  # float32 [..., 256], ascending


def dynamic_map() -> np.ndarray:
    """Returns [256] float32, ascending: signed dynamic 8-bit levels (arXiv:1511.04561; `create_dynamic_map`).

    The values are 0, 1 and, for each decimal exponent i - 6 with i in 0..6, the midpoints of 2^i equal steps between
    0.1 and 1 with both signs. They equal those that bitsandbytes builds with PyTorch, bit for bit.
    """
    values = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = _linspace(np.float32(0.1), np.float32(1), 2**i + 1)
        magnitudes = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*magnitudes, *-magnitudes]
    return np.sort(np.array(values, np.float32))


def _linspace(start: np.float32, end: np.float32, count: int) -> np.ndarray:
    """Like `torch.linspace`: each half counts from its own end, in float32 steps with one rounding per value."""
    step, index = np.float64((end - start) / np.float32(count - 1)), np.arange(count)
    from_start, from_end = start + step * index, end - step * (count - 1 - index)
    return np.where(index < count // 2, from_start, from_end).astype(np.float32)


def nest(scales: jax.Array) -> NestedScales:
    """Quantises the float32 scales [out, in / G] of one weight. Equals bitsandbytes byte for byte."""
    code_map = jnp.asarray(dynamic_map())
    flat = scales.reshape(-1)
    offset = flat.mean()
    blocks = _in_blocks(flat - offset)
    absmax = jnp.abs(blocks).max(axis=-1)
    normalised = blocks * (1.0 / jnp.maximum(absmax, TINY))[:, None]
    thresholds = (code_map[:-1] + code_map[1:]) / 2
    codes = jnp.searchsorted(thresholds, normalised, side="left").astype(jnp.uint8)
    return NestedScales(codes.reshape(-1)[: flat.size].reshape(scales.shape), absmax, offset, code_map)


def unnest(nested: NestedScales) -> jax.Array:
    """Returns the float32 scales [out, in / G] of one weight."""
    limits = nested.absmax[:, None]
    values = _in_blocks(nested.code_map[nested.codes.reshape(-1).astype(jnp.int32)]) * limits
    # Levels are at most 1, so this changes no value. It keeps compilers from emitting a fused multiply-add. Its single
    # rounding would differ from bitsandbytes in the last bit.
    values = jnp.clip(values, -limits, limits)
    return values.reshape(-1)[: nested.codes.size].reshape(nested.codes.shape) + nested.offset


def _in_blocks(flat: jax.Array) -> jax.Array:
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
