"""Sets of tokens as bits, [..., ceil(V / 32)] uint32: bit v % 32 of word v // 32 is token v."""

import jax
import jax.numpy as jnp
import numpy as np

ALL = np.uint32(0xFFFFFFFF)  # a word of tokens that are all allowed


def words_of(size: int) -> int:
    """Number of uint32 words for a set of tokens below `size`."""
    return -(-size // 32)


def unpacked(bits: np.ndarray, size: int) -> np.ndarray:
    """Unpacks [..., words] uint32 into [..., size] bool."""
    words = np.ascontiguousarray(bits, "<u4")
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[..., :size].astype(bool)


def packed(allowed: np.ndarray) -> np.ndarray:
    """Packs [..., size] bool into [..., words] uint32."""
    spare = -allowed.shape[-1] % 32
    padded = np.pad(allowed, [(0, 0)] * (allowed.ndim - 1) + [(0, spare)])
    return np.ascontiguousarray(np.packbits(padded, axis=-1, bitorder="little")).view("<u4").astype(np.uint32)


def where_allowed(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Sets logits [..., V] to -inf where `bits` [..., words] do not allow the token. Runs on the device."""
    token_V = jnp.arange(logits.shape[-1])
    words = jnp.take(bits, token_V // 32, axis=-1)
    return jnp.where(words >> (token_V % 32).astype(jnp.uint32) & 1 == 1, logits, -jnp.inf)
