"""Symmetric integers: x ≈ scale * q, with q in -8..7 (int4) or -127..127 (int8) and one scale per group."""

import jax
import jax.numpy as jnp


def encode_int4(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises float32 groups [..., G] to (codes uint8 [..., G] that store q + 8, scales bfloat16 [...]).

    The value of largest magnitude becomes -8. The scale then has the opposite sign, and all sixteen codes are used (the
    rule of llama.cpp's Q4_0, ggml-quants.c). Dividing by 7 would leave one code unused and cost 12 % more error. Codes
    are computed from the rounded scale, so its rounding adds no error of its own.
    """
    largest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    scales = (largest / -8.0).astype(jnp.bfloat16)
    return (_rounded(groups, scales, -8, 7) + 8).astype(jnp.uint8), scales


def encode_int8(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises float32 groups [..., G] to (codes int8 [..., G], scales bfloat16 [...])."""
    scales = (jnp.abs(groups).max(axis=-1) / 127.0).astype(jnp.bfloat16)
    return _rounded(groups, scales, -127, 127).astype(jnp.int8), scales


def decode_int4(codes: jax.Array) -> jax.Array:
    """Returns q as float32, given codes that store q + 8."""
    return codes.astype(jnp.float32) - 8.0


def decode_int8(codes: jax.Array) -> jax.Array:
    """Returns q as float32."""
    return codes.astype(jnp.float32)


def _rounded(groups: jax.Array, scales: jax.Array, lowest: int, highest: int) -> jax.Array:
    divisor = scales.astype(jnp.float32)[..., None]
    quotient = jnp.where(divisor == 0, 0.0, groups / jnp.where(divisor == 0, 1.0, divisor))
    return jnp.clip(jnp.round(quotient), lowest, highest)
