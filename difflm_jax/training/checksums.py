"""Checksums of checkpoints, so that a damaged checkpoint is always detected."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def json_checksum(values: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of metrics or of a list of leaves as JSON, the format in which orbax stores them."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def leaves_of(tree: Tree) -> dict[str, str]:
    """Returns {path: dtype and shape} of all leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def checksum_of(tree: Tree) -> jax.Array:
    """Returns a uint32 checksum of all bits of all leaves, computed without moving them.

    A leaf contributes the sum of its words, each times an odd number, modulo 2^32. An odd number has an inverse, so any
    change of one word changes the checksum. Integer sums do not depend on their order, so not on the sharding either.
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
