"""Prompt lookup: if the last tokens occurred before, the tokens that followed them are drafts that cost no pass."""

import jax
import jax.numpy as jnp

from difflm_jax.sampling.drafts import Nodes, no_nodes

SUFFIXES = (2, 3)  # lengths of the suffix that must have occurred before, if lookup replaces drafts
WITHOUT_DRAFTS = (1, 2, 3)  # the same, if it replaces none
CONFIDENCE = 0.7  # assumed for each looked-up token when anchors are chosen


def looked_up(
    tokens_BT: jax.Array, lengths_B: jax.Array, count: int, suffixes: tuple[int, ...] = SUFFIXES
) -> tuple[jax.Array, jax.Array]:
    """Looks up an earlier occurrence of the last tokens. Returns (the tokens after it [B, count], found [B] bool).

    The longest of `suffixes` is preferred, then the latest place. If fewer than `count` tokens follow, they repeat.
    """
    column_T = jnp.arange(tokens_BT.shape[1])
    last_B = lengths_B - 1
    same_BT = jnp.ones(tokens_BT.shape, bool)
    score_BT = jnp.zeros(tokens_BT.shape, jnp.int32)
    for back in range(max(suffixes)):
        suffix_B = jnp.take_along_axis(tokens_BT, jnp.maximum(last_B - back, 0)[:, None], axis=1)
        same_BT &= (jnp.roll(tokens_BT, back, axis=1) == suffix_B) & (column_T >= back) & (last_B >= back)[:, None]
        if back + 1 in suffixes:
            score_BT += same_BT
    score_BT = jnp.where(column_T < last_B[:, None], score_BT, 0)
    place_BT = jnp.where(score_BT > 0, score_BT * tokens_BT.shape[1] + column_T, -1)
    best_B = jnp.argmax(place_BT, axis=1)
    period_B = jnp.maximum(last_B - best_B, 1)
    index_BQ = best_B[:, None] + 1 + jnp.arange(count) % period_B[:, None]
    return jnp.take_along_axis(tokens_BT, index_BQ, axis=1), (score_BT > 0).any(axis=1)


def with_lookup(
    nodes: Nodes, tokens_BT: jax.Array, lengths_B: jax.Array, suffixes: tuple[int, ...] = SUFFIXES
) -> Nodes:
    """Replaces `nodes` by a chain of looked-up tokens, in rows where lookup finds some."""
    count = nodes.tokens.shape[1]
    tokens_BQ, found_B = looked_up(tokens_BT, lengths_B, count, suffixes)
    step_Q = jnp.arange(count, dtype=jnp.int32)

    def either(looked_Q: jax.Array | float | bool, own_BQ: jax.Array) -> jax.Array:
        return jnp.where(found_B[:, None], looked_Q, own_BQ)

    return Nodes(
        tokens=either(tokens_BQ, nodes.tokens),
        parents=either(step_Q, nodes.parents),
        depths=either(step_Q + 1, nodes.depths),
        valid=either(True, nodes.valid),
        confidence=either(CONFIDENCE, nodes.confidence),
        certain=nodes.certain | found_B,
    )


def with_branch(nodes: Nodes, tokens_BT: jax.Array, lengths_B: jax.Array, count: int) -> Nodes:
    """Adds `count` looked-up tokens to a chain of drafts, as a second branch after the last known token."""
    length = nodes.tokens.shape[1]
    branch = with_lookup(no_nodes(nodes.certain, count), tokens_BT, lengths_B, WITHOUT_DRAFTS)
    step_Q = jnp.arange(count, dtype=jnp.int32)
    parents = jnp.broadcast_to(jnp.where(step_Q == 0, 0, step_Q + length), branch.parents.shape)

    def both(name: str) -> jax.Array:
        return jnp.concatenate([getattr(nodes, name), getattr(branch, name)], axis=1)

    named = {name: both(name) for name in ("tokens", "depths", "valid", "confidence")}
    return Nodes(
        **named, parents=jnp.concatenate([nodes.parents, parents], axis=1), certain=jnp.ones_like(nodes.certain)
    )
