"""Numbers of the examples that share a row: 1, 2, ...; 0 is padding."""

import jax

from difflm_jax.data.fields import SHARED_SEGMENT


def same_example(segments_BT: jax.Array) -> jax.Array:
    """[B, T, T] bool: whether a token (the last axis) belongs to the example of another token, or to all examples."""
    key_B1T = segments_BT[:, None, :]
    return (segments_BT[:, :, None] == key_B1T) | (key_B1T == SHARED_SEGMENT)
