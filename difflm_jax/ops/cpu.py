"""Workaround for XLA on CPUs: keeps bfloat16 stacks as uint16 inside scans.

XLA's CPU backend moves no bfloat16. It turns the whole stack into float32 before a loop, twice the base in memory, and
every slice back. It moves integers unchanged, though the change of type copies the stack once. Other backends need none
of this, and would pay for that copy: `Transformer.on_cpu` says where it is wanted. `jax.lax.platform_dependent` cannot
choose at lowering here, because its branches must return one dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def bits_of(tree: Any) -> Any:
    """`tree` with its bfloat16 leaves as uint16. No weight is stored in uint16 otherwise."""
    return jax.tree.map(lambda x: _bits(x) if x.dtype == jnp.bfloat16 else x, tree)


def floats_of(tree: Any) -> Any:
    """The inverse of `bits_of`."""
    return jax.tree.map(lambda x: _floats(x) if x.dtype == jnp.uint16 else x, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: jax.Array, name: str) -> jax.Array:
    """Returns `x`, named for remat policies; what a scan saves of it over the layers is bits."""
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
