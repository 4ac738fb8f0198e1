"""Random bits per token: cheap, and a function of only the key, the example and the position in it.

A draw for a token must not depend on its row, on padding or on the device. Each token therefore has its own generator.
Threefry would need a key schedule and twenty rounds per token. Masks and dropout need only a good mix of counters,
which MurmurHash3's 32-bit finaliser gives (SplitMix generators: Steele et al., 2014).
"""

import jax
import jax.numpy as jnp
import numpy as np

_GAMMA = np.uint32(0x9E3779B9)  # 2^32 / golden ratio; odd, so its multiples visit every uint32


def token_seeds(key: jax.Array, example_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """uint32 seeds, one per token, in the shape of `example_ids` and `positions`; `key` is JAX's, e.g. of a step."""
    of_examples, of_positions = jax.random.bits(key, (2,))
    seeds = _mix(of_examples + example_ids.astype(jnp.uint32) * _GAMMA)
    return _mix(of_positions + seeds + positions.astype(jnp.uint32) * _GAMMA)


def fold_seeds(seeds: jax.Array, number: int | jax.Array) -> jax.Array:
    """Seeds of stream `number`, derived from `seeds`. A stream is a layer, an input in it, or a copy of the row."""
    return _mix(seeds ^ _mix((jnp.asarray(number).astype(jnp.uint32) + 1) * _GAMMA))


def element_bits(seeds: jax.Array, elements: jax.Array) -> jax.Array:
    """uint32 random bits [..., D] for the elements numbered `elements` [D] of tokens with `seeds` [...]."""
    return _mix(seeds[..., None] + elements.astype(jnp.uint32) * _GAMMA)


def uniform(seeds: jax.Array) -> jax.Array:
    """float32 in [0, 1), one per seed."""
    return (_mix(seeds + _GAMMA) >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
