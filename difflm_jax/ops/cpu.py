"""bfloat16 arrays as integers of the same bits, where a loop takes slices of a stack or puts them into one.

XLA's CPU backend moves no bfloat16: it turns the whole stack into float32 before the loop, twice the base in memory,
and every slice back. Integers it moves as they are, though the change of type is a copy of the stack, once the base.
Other backends need none of this: weights are left as they are there (`Transformer.on_cpu`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def bits_of(tree: Any) -> Any:
    """A tree whose bfloat16 leaves are uint16; no weight is stored in that type otherwise."""
    return jax.tree.map(lambda x: _bits(x) if x.dtype == jnp.bfloat16 else x, tree)


def floats_of(tree: Any) -> Any:
    """The inverse of `bits_of`."""
    return jax.tree.map(lambda x: _floats(x) if x.dtype == jnp.uint16 else x, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: jax.Array, name: str) -> jax.Array:
    """`x`, which a remat policy knows as `name`; a stack of them over layers holds bits."""
    return named(x, name)


@kept.defjvp
def _kept_jvp(name: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return named(primals[0], name), tangents[0]  # a policy does not look into a call of `kept` itself


def named(x: jax.Array, name: str) -> jax.Array:
    """What `kept` is once it was differentiated: for rules that are written by hand, which nothing differentiates."""
    return floats_of(checkpoint_name(bits_of(x), name))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _floats(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16)
