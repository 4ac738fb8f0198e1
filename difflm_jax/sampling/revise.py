"""Revision: which committed tokens of the active block are remasked or replaced."""

import jax
import jax.numpy as jnp

REMASKINGS = ("cap", "rescale", "conf")


def remask_rates(
    remask: str, eta: jax.Array | None, confidence_BT: jax.Array, committed_BT: jax.Array, t: jax.Array, s: jax.Array
) -> jax.Array:
    """[B, T] probability σ of remasking a committed token from time t to s (ReMDM, arXiv:2503.00307).

    With alpha = 1 - t, σ is at most σ_max = min(1, (1 - alpha_s) / alpha_t). "cap": min(`eta`, σ_max). "rescale":
    `eta` * σ_max. "conf": σ_max times a softmax of -`confidence_BT` over a row's committed tokens, where
    `confidence_BT` is their probability when they were committed.
    """
    most = jnp.where(t < 1, jnp.minimum(1.0, s / jnp.maximum(1 - t, 1e-12)), 1.0)
    if remask == "cap":
        return jnp.broadcast_to(jnp.minimum(eta, most), committed_BT.shape)
    if remask == "rescale":
        return jnp.broadcast_to(eta * most, committed_BT.shape)
    return jnp.where(committed_BT, most * jax.nn.softmax(-confidence_BT, axis=1, where=committed_BT), 0.0)


def unmask_rate(remask_rate: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """Probability that a mask is revealed: (alpha_s - (1 - σ) alpha_t) / (1 - alpha_t), and 1 at s = 0 (ReMDM).

    On average this leaves as many masks as without remasking.
    """
    rate = ((1 - s) - (1 - remask_rate) * (1 - t)) / t
    return jnp.where(s == 0, 1.0, rate)


def edited(
    tokens_BT: jax.Array, chosen_BT: jax.Array, probability_BT: jax.Array, committed_BT: jax.Array, threshold: jax.Array
) -> jax.Array:
    """[B, T] bool: committed tokens that the model would now replace with probability above `threshold`.

    This is the token-to-token editing of LLaDA2.1 (arXiv:2602.08676).
    """
    return committed_BT & (tokens_BT != chosen_BT) & (probability_BT > threshold)
