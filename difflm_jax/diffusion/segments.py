"""Segments, the numbers of the examples that share a row: 1, 2, ...; 0 is padding."""

import jax
import jax.numpy as jnp

from difflm_jax.data.fields import SHARED_SEGMENT
from difflm_jax.models.flops import Work


def same_example(segments_BT: jax.Array) -> jax.Array:
    """Returns [B, T, T] bool (query, key): whether the key belongs to the query's example or to all examples."""
    key_B1T = segments_BT[:, None, :]
    return (segments_BT[:, :, None] == key_B1T) | (key_B1T == SHARED_SEGMENT)


def work_of_examples(segments_BL: jax.Array, lengths_BL: jax.Array) -> Work:
    """Returns the work of one pass over the rows, without padding and scores: a token pairs with all of its example.

    `lengths_BL`: tokens of each token's example. Tokens shared by all examples of a row pair only with each other.
    """
    shared_BL = segments_BL == SHARED_SEGMENT
    met_BL = jnp.where(shared_BL, shared_BL.sum(axis=1, keepdims=True), lengths_BL).astype(jnp.float32)
    real_BL = (segments_BL != 0).astype(jnp.float32)
    return Work(real_BL.sum(), (real_BL * met_BL).sum(), 0 * real_BL.sum())
