"""Random bits of single tokens: cheap, and a function of (key, example, position in it) alone.

A draw for a token must not depend on the row that the token lies in, on its padding, or on the device, so there is one
generator a token. Threefry would need a key schedule and twenty rounds for each; masks and dropout need no more than a
good mix of their counters, which MurmurHash3's 32-bit finaliser gives (SplitMix generators: Steele et al., 2014).
"""

import jax
import jax.numpy as jnp
import numpy as np

_GAMMA = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio, odd: multiples of it visit every number


def token_seeds(key: jax.Array, example_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """uint32 seeds, one a token, of the shape of `example_ids` and `positions`; `key` is jax's, e.g. of a step."""
    of_examples, of_positions = jax.random.bits(key, (2,))
    seeds = _mix(of_examples + example_ids.astype(jnp.uint32) * _GAMMA)
    return _mix(of_positions + seeds + positions.astype(jnp.uint32) * _GAMMA)


def fold_seeds(seeds: jax.Array, number: int | jax.Array) -> jax.Array:
    """Seeds of stream `number` made of `seeds`: a layer, an input within it, a copy of the row."""
    return _mix(seeds ^ _mix((jnp.asarray(number).astype(jnp.uint32) + 1) * _GAMMA))


def element_bits(seeds: jax.Array, elements: jax.Array) -> jax.Array:
    """uint32 random bits [..., D] of the elements numbered `elements` [D] of tokens with `seeds` [...]."""
    return _mix(seeds[..., None] + elements.astype(jnp.uint32) * _GAMMA)


def uniform(seeds: jax.Array) -> jax.Array:
    """float32 in [0, 1), one of each seed."""
    return (_mix(seeds + _GAMMA) >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
