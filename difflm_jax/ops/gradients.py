"""Helpers for `custom_vjp` rules that skip the gradients of arguments which are not being differentiated.

They serve the forward rules of `jax.custom_vjp(...).defvjp(..., symbolic_zeros=True)`, which receive each array as a
`jax.custom_derivatives.CustomVJPPrimal`.
"""

from typing import Any

import jax


def is_differentiated(argument: Any) -> bool:
    """Whether any array of an argument of a forward rule is being differentiated."""
    return any(leaf.perturbed for leaf in jax.tree.leaves(argument))


def values(*arguments: Any) -> tuple[Any, ...]:
    """Returns the plain arrays of the arguments of a forward rule."""
    return jax.tree.map(lambda leaf: leaf.value, arguments)
