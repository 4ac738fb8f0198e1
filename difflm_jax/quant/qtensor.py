"""Frozen weights in 4 or 8 bits: a pytree of packed codes and scales, with quantisation and dequantisation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.distributed.collectives import TENSOR, varies
from difflm_jax.errors import UserError
from difflm_jax.quant import integers, nf4
from difflm_jax.quant.nested import NestedScales, nest, unnest
from difflm_jax.utils.settings import setting


@dataclasses.dataclass(frozen=True)
class Format:
    """How values are encoded.

    encode: maps float32 groups [..., G] to (codes [..., G], scales [...]). decode: maps codes to float32 values for a
    scale of 1. 4-bit codes are uint8 in 0..15; two of them share a byte of a `QTensor`.
    """

    bits: int
    encode: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    decode: Callable[[jax.Array], jax.Array]


FORMATS = {
    "nf4": Format(4, nf4.encode, nf4.decode),
    "int4": Format(4, integers.encode_int4, integers.decode_int4),
    "int8": Format(8, integers.encode_int8, integers.decode_int8),
}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How weights are quantised. Raises `UserError` for an unknown format or block size.

    block_size: weights along the input that share a scale (G), a power of two from 16 to 4096.
    double_quant: NF4's scales are stored in 8 bits (4.127 bits per weight at G = 64), not float32 (4.5). The integer
      formats always have bfloat16 scales (4.25 and 8.25 bits per weight).
    """

    format: str = setting(
        help="Format of the frozen projections: nf4, int4 or int8; empty: none.", config_default="", key="quantization"
    )
    block_size: int = setting(64, "Weights along the input that share a scale.", key="quantization_block_size")
    double_quant: bool = setting(True, "NF4's scales are quantised too.", key="double_quantization")

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"quantization={self.format!r} is not one of {', '.join(FORMATS)}")
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or not 16 <= size <= 4096 or size & (size - 1):
            raise UserError(f"quantization_block_size={size!r} must be a power of two from 16 to 4096")


@struct.dataclass
class QTensor:
    """A weight [out, in], or a stack of them with leading axes on every leaf.

    codes: int8 [..., out, in] for int8, else uint8 [..., out, in / 2]. A byte has elements i (low nibble) and i + G/2
      of its group, so both halves of a group unpack from whole vectors of bytes, without interleaving.
    scales: [..., out, in / G].
    The shape is derived from the leaves, so it is also correct for slices in `scan` and for shards.
    """

    codes: jax.Array
    scales: jax.Array | NestedScales
    format: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (8 // FORMATS[self.format].bits))

    @property
    def block_size(self) -> int:
        scales = self.scales.codes if isinstance(self.scales, NestedScales) else self.scales
        return self.shape[-1] // scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def quantize(weight: jax.Array, config: QuantConfig) -> QTensor:
    """Quantises `weight` [out, in] of any float dtype to the format of `config`. Computes in float32; jittable.

    Raises `UserError` if `in` is not a multiple of the block size, because a block never spans two rows.
    """
    if weight.shape[-1] % config.block_size:
        raise UserError(
            f"quantization_block_size={config.block_size} does not divide the {weight.shape[-1]} input features"
        )
    groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, config.block_size)
    codes, scales = FORMATS[config.format].encode(groups)
    if config.format == "nf4" and config.double_quant:
        scales = nest(scales)
    codes = pack(codes) if FORMATS[config.format].bits == 4 else codes.reshape(weight.shape)
    return QTensor(codes, scales, config.format)


def dequantize(w: QTensor, dtype: Any) -> jax.Array:
    """Returns the weight [..., out, in] in `dtype`: code values times scales in float32, then rounded once."""
    if w.codes.ndim > 2:
        return jax.vmap(functools.partial(dequantize, dtype=dtype))(w)
    scales = unnest(w.scales) if isinstance(w.scales, NestedScales) else w.scales.astype(jnp.float32)
    form = FORMATS[w.format]
    parts = _halves(w.codes, w.block_size) if form.bits == 4 else (w.codes.reshape(*scales.shape, -1),)
    # Dequantise each half before joining them. Joined codes would take 2 GiB more of an H100 in a training step of
    # Qwen3-4B (compiled ahead of time), and a sixth more time on a CPU.
    values = [(form.decode(part) * scales[..., None]).astype(dtype) for part in parts]
    return jnp.concatenate(values, axis=-1).reshape(w.shape)


def own_scales(w: QTensor) -> QTensor:
    """Returns `w` with only the scales of this device's codes, if the codes are sharded over `tensor`.

    Nested scales cannot be sharded like codes (`NestedScales`). Every device of the axis stores all of them and takes
    its part here. Other scales are returned unchanged.
    """
    if not isinstance(w.scales, NestedScales) or not varies(w.codes, TENSOR):
        return w
    scales, part = unnest(w.scales), jax.lax.axis_index(TENSOR)
    axis = 1 if scales.shape[0] == w.codes.shape[0] else 0  # sharded along the input, or along the output
    size = scales.shape[axis] // jax.lax.axis_size(TENSOR)
    return w.replace(scales=jax.lax.dynamic_slice_in_dim(scales, part * size, size, axis=axis))


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes in 0..15, uint8 [..., n, G], to uint8 [..., n * G / 2] in the order of `QTensor.codes`."""
    low, high = jnp.split(codes, 2, axis=-1)
    return (low | (high << 4)).reshape(*codes.shape[:-2], -1)


def unpack(packed: jax.Array, block_size: int) -> jax.Array:
    """The inverse of `pack`: uint8 [..., n * G / 2] -> [..., n, G]."""
    return jnp.concatenate(_halves(packed, block_size), axis=-1)


def _halves(packed: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    grouped = packed.reshape(*packed.shape[:-1], -1, block_size // 2)
    return grouped & 15, grouped >> 4
