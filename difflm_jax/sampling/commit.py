"""Rules for which masks of the active block are committed: functions (score, open, quota, ...) -> [B, T] bool.

`score_BT` ranks the positions (`difflm_jax.sampling.confidence`) and `open_BT` marks those that may be committed. Every
rule but `by_rate` commits at least the `quota_B` best. Ties go to the leftmost. Rows do not depend on each other.
"""

import jax
import jax.numpy as jnp


def ranks(score_BT: jax.Array, open_BT: jax.Array) -> jax.Array:
    """[B, T] int32: ranks by descending score, from 0, among open positions; the others come last."""
    # Two stable sorts: by descending score (ties keep their order), then open before closed.
    by_score_BT = jnp.argsort(-score_BT, axis=1, stable=True)
    closed_BT = jnp.take_along_axis(~open_BT, by_score_BT, axis=1)
    order_BT = jnp.take_along_axis(by_score_BT, jnp.argsort(closed_BT, axis=1, stable=True), axis=1)
    return jnp.argsort(order_BT, axis=1)


def deadline_quota(open_BT: jax.Array, passes_left_B: jax.Array) -> jax.Array:
    """[B] masks to commit now so that an even pace finishes in `passes_left_B` passes, at least 1.

    Later quotas shrink if a rule committed more than its share or an end of sequence closed masks.
    """
    return -(-open_BT.sum(axis=1) // passes_left_B)


def leftmost_first(score_BT: jax.Array, open_BT: jax.Array) -> jax.Array:
    """Raises the score of each row's leftmost open position to inf, so that every rule commits it.

    It is the one mask whose left context is complete, as in the causal model.
    """
    is_first_BT = open_BT & (jnp.cumsum(open_BT, axis=1) == 1)
    return jnp.where(is_first_BT, jnp.inf, score_BT)


def most_confident(score_BT: jax.Array, open_BT: jax.Array, quota_B: jax.Array) -> jax.Array:
    """Commits the `quota_B` open positions of highest score."""
    return open_BT & (ranks(score_BT, open_BT) < quota_B[:, None])


def above_threshold(log_odds_BT: jax.Array, open_BT: jax.Array, quota_B: jax.Array, threshold: jax.Array) -> jax.Array:
    """Commits all positions of probability at least `threshold` (Fast-dLLM, arXiv:2505.22618)."""
    sure_BT = open_BT & (jax.nn.sigmoid(log_odds_BT) >= threshold)
    return sure_BT | most_confident(log_odds_BT, open_BT, quota_B)


def within_factor(log_odds_BT: jax.Array, open_BT: jax.Array, quota_B: jax.Array, factor: jax.Array) -> jax.Array:
    """Commits ranks r = 1, 2, ... while their probability is at least 1 - factor / (r + 1) (Fast-dLLM)."""
    rank_BT = ranks(log_odds_BT, open_BT)
    # Computing 1 - p from the log-odds is exact even where p itself rounds to 1.
    fails_BT = open_BT & (jax.nn.sigmoid(-log_odds_BT) * (rank_BT + 2) > factor)
    first_failure_B1 = jnp.where(fails_BT, rank_BT, rank_BT.shape[1]).min(axis=1, keepdims=True)
    return open_BT & (rank_BT < jnp.maximum(first_failure_B1, quota_B[:, None]))


def within_entropy(
    negative_entropy_BT: jax.Array, open_BT: jax.Array, quota_B: jax.Array, bound: jax.Array
) -> jax.Array:
    """Commits positions in order of entropy H, while the entropies before the last add up to at most `bound` nats.

    ΣH - max H bounds how far independent draws are from a joint draw (EB-Sampler, arXiv:2505.24857).
    """
    rank_BT = ranks(negative_entropy_BT, open_BT)
    entropy_BT = jnp.where(open_BT & ~jnp.isposinf(negative_entropy_BT), -negative_entropy_BT, 0.0)  # inf: leftmost
    before_BTT = rank_BT[:, None, :] < rank_BT[:, :, None]
    total_before_BT = (before_BTT * entropy_BT[:, None, :]).sum(axis=-1)
    return open_BT & ((total_before_BT <= bound) | (rank_BT < quota_B[:, None]))


def by_rate(uniform_BT: jax.Array, open_BT: jax.Array, rate_BT: jax.Array) -> jax.Array:
    """Commits each open position with probability `rate_BT`: ancestral sampling (MDLM; Dream's `origin`)."""
    return open_BT & (uniform_BT < rate_BT)
