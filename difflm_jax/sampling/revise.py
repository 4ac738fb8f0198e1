"""Second thoughts: which committed tokens of the active block are masked again, or replaced."""

import jax
import jax.numpy as jnp

REMASKINGS = ("cap", "rescale", "conf")


def remask_rates(
    remask: str, eta: jax.Array | None, confidence_BT: jax.Array, committed_BT: jax.Array, t: jax.Array, s: jax.Array
) -> jax.Array:
    """[B, T] probability σ of masking a committed token again from time t to s (ReMDM, arXiv:2503.00307).

    With alpha = 1 - t it is at most (1 - alpha_s) / alpha_t. "cap": at most `eta`; "rescale": `eta` of that; "conf":
    shared out over the committed tokens of a row by a softmax of minus `confidence_BT`, their probability when they
    were committed.
    """
    most = jnp.where(t < 1, jnp.minimum(1.0, s / jnp.maximum(1 - t, 1e-12)), 1.0)
    if remask == "cap":
        return jnp.broadcast_to(jnp.minimum(eta, most), committed_BT.shape)
    if remask == "rescale":
        return jnp.broadcast_to(eta * most, committed_BT.shape)
    return jnp.where(committed_BT, most * jax.nn.softmax(-confidence_BT, axis=1, where=committed_BT), 0.0)


def unmask_rate(remask_rate: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """Probability that a mask is revealed, (alpha_s - (1 - σ) alpha_t) / (1 - alpha_t), so that as many masks are left
    on average as without remasking (ReMDM); all of them at s = 0."""
    rate = ((1 - s) - (1 - remask_rate) * (1 - t)) / t
    return jnp.where(s == 0, 1.0, rate)


def edited(
    tokens_BT: jax.Array, chosen_BT: jax.Array, probability_BT: jax.Array, committed_BT: jax.Array, threshold: jax.Array
) -> jax.Array:
    """[B, T] bool: committed tokens that the model would now replace with probability above `threshold`
    (token-to-token editing, LLaDA2.1, arXiv:2602.08676)."""
    return committed_BT & (tokens_BT != chosen_BT) & (probability_BT > threshold)
