"""AdamW in two parts: a transformation without a learning rate, and the schedule as a function of the step.

The step applies `parameter - learning_rate(step) * update`. Because they are separate, a second phase can keep Adam's
moments and start the schedule again.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from difflm_jax.distributed.collectives import FSDP, TENSOR, axes_of
from difflm_jax.errors import UserError


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Returns clipping by global norm, Adam and decoupled weight decay (arXiv:1711.05101), without a learning rate.

    `max_grad_norm=0` turns clipping off. `update(gradient, state, parameters)` requires the parameters. The moments
    have the dtype of the parameters.
    """
    return optax.chain(
        clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay),
    )


def global_norm(tree: Any) -> jax.Array:
    """Returns the L2 norm over all leaves, and over all devices if a leaf is divided over `fsdp` or `tensor`.

    `optax.tree.norm` and optax's own clipping would see only one device's part.
    """
    squares: dict[tuple[str, ...], jax.Array] = {}  # by the axes over which they must be summed
    for leaf in jax.tree.leaves(tree):
        axes = axes_of(leaf, (FSDP, TENSOR))
        squares[axes] = squares.get(axes, 0.0) + jnp.sum(jnp.square(leaf))
    for axis in (FSDP, TENSOR):
        if divided := [axes for axes in squares if axis in axes]:
            totals = jax.lax.psum([squares.pop(axes) for axes in divided], axis)
            for axes, total in zip(divided, totals, strict=True):
                rest = tuple(other for other in axes if other != axis)
                squares[rest] = squares.get(rest, 0.0) + total
    return jnp.sqrt(squares[()])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Like `optax.clip_by_global_norm`, with the norm of `global_norm`."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        norm = global_norm(updates)
        return jax.tree.map(lambda t: jnp.where(norm < max_norm, t, (t / norm) * max_norm), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate_schedule(config: Any, total_steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """Returns `learning_rate(step)`, float32 and jittable, for steps 0 to total_steps - 1.

    It rises linearly from 0 over `warmup_steps`. Then `lr_schedule` is "linear" to 0 at `total_steps`, half a "cosine"
    to 0, or "constant", as in `transformers.get_scheduler`. Raises `UserError` if the warm-up exceeds `total_steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup > total_steps:
        raise UserError(f"warmup_steps={warmup}: the phase has only {total_steps} steps")

    def learning_rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(1, warmup)
        progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        falling = _DECAY[config.lr_schedule](progress)
        return peak * jnp.where(step < warmup, rising, falling)

    return learning_rate


# Share of the peak, as a function of the share `progress` of the steps after the warm-up.
_DECAY = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    "constant": jnp.ones_like,
}
