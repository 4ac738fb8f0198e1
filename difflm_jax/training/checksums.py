"""What a checkpoint says of itself, so that a damaged one is never taken for whole."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def json_checksum(values: Mapping[str, Any]) -> int:
    """CRC-32 of metrics or of a list of leaves as JSON, which is how orbax stores them."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def leaves_of(tree: Tree) -> dict[str, str]:
    """{path: dtype and shape} of all leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def checksum_of(tree: Tree) -> jax.Array:
    """A uint32 over all bits of all leaves, computed where they lie; any one changed bit changes it.

    Each leaf counts as the sum of its words, each times an odd number, modulo 2^32: an odd number has an inverse, so no
    change of one word is lost, and integer sums do not depend on their order, that is on the sharding.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(words.shape):  # the index in the flattened leaf, without moving a sharded one
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        total = 31 * total + jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
    return total
