"""Which proposed tokens are accepted. The generated text is distributed exactly as the base's own."""

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.sampling.drafts import Drafts, Nodes
from difflm_jax.sampling.proposal import noise

ACCEPT_STREAM, RESIDUAL_STREAM = 5, 6


@struct.dataclass
class Accepted:
    """The outcome of a verifying pass for each row."""

    count: jax.Array  # [B] int32, accepted nodes
    path: jax.Array  # [B, 1 + deepest] int32, the rows of the pass on the accepted path; row 0 first and after its end
    next_token: jax.Array  # [B] int32, the base's own token after the path

    @property
    def end(self) -> jax.Array:
        """[B] int32: the row of the pass where the path ends."""
        return jnp.take_along_axis(self.path, self.count[:, None], axis=1)[:, 0]

    def emitted(self, nodes: Nodes) -> jax.Array:
        """[B, 1 + deepest] int32: the tokens of the path, then the base's own; later entries are undefined."""
        rows_BN = jnp.concatenate([jnp.zeros_like(self.count)[:, None], nodes.tokens], axis=1)
        on_path = jnp.roll(jnp.take_along_axis(rows_BN, self.path, axis=1), -1, axis=1)
        return jnp.where(jnp.arange(self.path.shape[1]) == self.count[:, None], self.next_token[:, None], on_path)


def by_choice(nodes: Nodes, ancestors_BNN: jax.Array, choices_BN: jax.Array, deepest: int) -> Accepted:
    """Accepts nodes whose token equals the base's choice after their parent.

    `choices_BN` is the base's token after each row: its most probable one, or a draw of its own. Either way the text is
    the base's: a choice that no child matches is emitted itself.
    """
    expected_BQ = jnp.take_along_axis(choices_BN, nodes.parents, axis=1)
    matches_BQ = nodes.valid & (nodes.tokens == expected_BQ)
    matches_BN = jnp.concatenate([jnp.ones_like(matches_BQ, shape=(len(matches_BQ), 1)), matches_BQ], axis=1)
    on_path_BN = (matches_BN[:, None, :] | ~ancestors_BNN).all(axis=2)
    depth_BN = jnp.concatenate([jnp.zeros_like(nodes.depths, shape=(len(matches_BQ), 1)), nodes.depths], axis=1)
    count_B = jnp.where(on_path_BN, depth_BN, 0).max(axis=1)
    is_step = on_path_BN[:, None, :] & (depth_BN[:, None, :] == jnp.arange(deepest + 1)[:, None])
    path = jnp.argmax(is_step, axis=2).astype(jnp.int32)
    end_B1 = jnp.take_along_axis(path, count_B[:, None], axis=1)
    return Accepted(count_B, path, jnp.take_along_axis(choices_BN, end_B1, axis=1)[:, 0])


def by_rejection(nodes: Nodes, drafts: Drafts, logits_BNV: jax.Array, keys_B: jax.Array) -> Accepted:
    """Rejection sampling along a chain (arXiv:2211.17192): accepts a token with probability min(1, p / q).

    The first rejected token is replaced by a draw from max(p - q, 0). If none is rejected, a draw from p follows.
    `logits_BNV` are those of p after each row, `drafts.logits` those of q; both after temperature, top-p and top-k.
    Looked-up tokens are certain: their q is a point mass.
    """
    length, vocabulary = nodes.tokens.shape[1], logits_BNV.shape[-1]
    token_V = jnp.arange(vocabulary)
    p_BNV = jax.nn.softmax(logits_BNV, axis=-1)
    point_BQV = (nodes.tokens[..., None] == token_V).astype(jnp.float32)
    q_BQV = jnp.where(nodes.certain[:, None, None], point_BQV, jax.nn.softmax(drafts.logits, axis=-1))
    p_BQ = (p_BNV[:, :length] * point_BQV).sum(axis=-1)
    q_BQ = (q_BQV * point_BQV).sum(axis=-1)
    chance_BQ = noise(jax.random.uniform, keys_B, ACCEPT_STREAM, (length,))
    accepts_BQ = nodes.valid & (chance_BQ * q_BQ < p_BQ)
    count_B = jnp.cumprod(accepts_BQ.astype(jnp.int32), axis=1).sum(axis=1)

    was_proposed_BQ = jnp.concatenate([nodes.valid, jnp.zeros_like(nodes.valid[:, :1])], axis=1)
    q_BNV = jnp.concatenate([q_BQV, jnp.zeros_like(q_BQV[:, :1])], axis=1) * was_proposed_BQ[..., None]
    p_BV, q_BV = (jnp.take_along_axis(x, count_B[:, None, None], axis=1)[:, 0] for x in (p_BNV, q_BNV))
    gumbel_BV = noise(jax.random.gumbel, keys_B, RESIDUAL_STREAM, (vocabulary,), mode="high")
    next_B = jnp.argmax(jnp.log(residual(p_BV, q_BV)) + gumbel_BV, axis=-1).astype(jnp.int32)
    step = jnp.arange(length + 1, dtype=jnp.int32)
    return Accepted(count_B, jnp.where(step <= count_B[:, None], step, 0), next_B)


def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """[B, V] max(p - q, 0), unnormalised: the distribution after a draw from q was rejected. p if that is all zero."""
    left_BV = jnp.maximum(p_BV - q_BV, 0.0)
    return jnp.where(left_BV.sum(axis=-1, keepdims=True) > 0, left_BV, p_BV)
