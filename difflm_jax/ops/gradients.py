"""Which arguments of a function with a hand-written gradient are differentiated, so that no other's gradient is made.

For the forward rules of `jax.custom_vjp(...).defvjp(..., symbolic_zeros=True)`, which get each array as an object that
knows (`jax.custom_derivatives.CustomVJPPrimal`).
"""

from typing import Any

import jax


def is_differentiated(argument: Any) -> bool:
    """Whether any array of an argument of a forward rule is differentiated."""
    return any(leaf.perturbed for leaf in jax.tree.leaves(argument))


def values(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of a forward rule as the function itself takes them."""
    return jax.tree.map(lambda leaf: leaf.value, arguments)
