"""Workaround for XLA on CPUs: keeps bfloat16 stacks as uint16 inside scans.

XLA's CPU backend cannot move bfloat16. It converts the whole stack to float32 before a loop, which takes twice the
base's memory, and converts every slice back. Integers are moved unchanged, at the cost of one copy of the stack for the
bitcast. Other backends do not need this, so `Transformer.on_cpu` selects it. `jax.lax.platform_dependent` cannot,
because its branches must return one dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def bits_of(tree: Any) -> Any:
    """Bitcasts the bfloat16 leaves of `tree` to uint16. No weight is stored in uint16 otherwise."""
    return jax.tree.map(lambda x: _bits(x) if x.dtype == jnp.bfloat16 else x, tree)


def floats_of(tree: Any) -> Any:
    """The inverse of `bits_of`."""
    return jax.tree.map(lambda x: _floats(x) if x.dtype == jnp.uint16 else x, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: jax.Array, name: str) -> jax.Array:
    """Returns `x`, named for remat policies. A scan over layers saves it as uint16."""
    return named(x, name)


@kept.defjvp
def _kept_jvp(name: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return named(primals[0], name), tangents[0]  # a remat policy does not look inside a call of `kept`


def named(x: jax.Array, name: str) -> jax.Array:
    """Like `kept`, for use inside hand-written VJP rules, which are never differentiated."""
    return floats_of(checkpoint_name(bits_of(x), name))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _floats(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16)
