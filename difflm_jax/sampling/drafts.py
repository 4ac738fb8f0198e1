"""Proposals of speculative decoding: chains of drafts, prompt lookup, trees, and where to draft for the next pass.

Row 0 of a verifying pass is the last known token; proposed node i is row i + 1. A node's parent is given as a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

STRATEGIES = ("two_pass", "one_pass", "likeliest", "tree", "lookup")


@dataclasses.dataclass(frozen=True)
class Drafting:
    """How tokens are drafted.

    Strategies:
      two_pass: a pass with noise rows after the last token, then a verifying pass (Uno, arXiv:2609.04010).
      one_pass: the verifying pass has noise rows after every row where acceptance may end.
      likeliest: like one_pass, but only after the two rows where acceptance most probably ends.
      tree: two passes. The second verifies the `nodes` most probable paths through `branches` tokens per depth.
      lookup: only looked-up drafts.
      plain: no drafts, one token per pass.

    length: drafts per pass, m.
    lookup: if the last tokens occurred before, propose the tokens that followed them instead of drafts.
    beside: number of looked-up tokens proposed as a second branch in addition to the drafts; 0: no second branch.
    noise: the token id of every noise row; None: ids uniform over the vocabulary.
    passes: diffusion passes per draft, with diffusion drafts (`verified`).
    """

    strategy: str = "one_pass"
    length: int = 4
    lookup: bool = True
    noise: int | None = None
    nodes: int = 16
    branches: int = 4
    passes: int = 1
    beside: int = 0

    @property
    def drafts_first(self) -> bool:
        """Whether a cycle begins with a drafting pass."""
        return self.strategy in ("two_pass", "tree")

    @property
    def num_nodes(self) -> int:
        """Number of tokens that a verifying pass verifies."""
        if self.strategy == "tree":
            return min(self.nodes, sum(self.branches**depth for depth in range(1, self.length + 1)))
        return 0 if self.strategy == "plain" else self.length + self.beside

    @property
    def num_anchors(self) -> int:
        """Number of rows in a verifying pass that are followed by noise rows."""
        return {"one_pass": self.num_nodes + 1, "likeliest": min(2, self.num_nodes + 1)}.get(self.strategy, 0)

    @property
    def num_rows(self) -> int:
        """Number of rows in the largest pass."""
        return 1 + self.num_nodes + self.num_anchors * self.length

    @property
    def deepest(self) -> int:
        """Maximum number of drafts that a pass accepts."""
        if self.beside:
            return max(self.length, self.beside)
        return self.length if self.strategy == "tree" and not self.lookup else self.num_nodes

    @property
    def branches_out(self) -> bool:
        """Whether the proposed tokens may form more than one chain."""
        return self.strategy == "tree" or self.beside > 0


@struct.dataclass
class Drafts:
    """Drafts of the tokens after the last known one; m = Q for a chain. A tree also has `candidates` of each depth."""

    tokens: jax.Array  # [B, m] int32
    drafted: jax.Array  # [B] bool, False: the row has no drafts
    confidence: jax.Array  # [B, m] float32, probability of each under the draft distribution
    logits: jax.Array | None = None  # [B, m, V] float32, of the distributions of the draws; None: greedy
    candidates: jax.Array | None = None  # [B, m, C] int32, the most probable tokens of each depth
    log_p: jax.Array | None = None  # [B, m, C] float32, their log-probabilities


@struct.dataclass
class Nodes:
    """Tokens to verify. A node is reached if it and all nodes between it and row 0 are accepted."""

    tokens: jax.Array  # [B, Q] int32
    parents: jax.Array  # [B, Q] int32, rows
    depths: jax.Array  # [B, Q] int32, from 1
    valid: jax.Array  # [B, Q] bool
    confidence: jax.Array  # [B, Q] float32
    certain: jax.Array  # [B] bool, the tokens were not drawn: their draft distribution is a point mass


def chain_nodes(drafts: Drafts) -> Nodes:
    """Returns nodes where each draft follows the one before it."""
    batch, length = drafts.tokens.shape
    step = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    valid = jnp.broadcast_to(drafts.drafted[:, None], (batch, length))
    confidence = jnp.where(valid, drafts.confidence, 0.0)
    return Nodes(drafts.tokens, step, step + 1, valid, confidence, jnp.zeros_like(drafts.drafted))


def tree_nodes(drafts: Drafts, nodes: int) -> Nodes:
    """Returns the `nodes` most probable paths through the candidates of all depths, parents before children.

    The drafts of a depth do not depend on earlier ones, so a path's probability is a product. The parent of a best path
    is itself among the best, so each depth keeps only its `nodes` best paths.
    """
    batch, depths, branches = drafts.candidates.shape
    score, tokens, parents = [], [], []  # [B, W] per depth; a parent is an index over all depths, -1: row 0
    beam_BW, offset, first = jnp.zeros((batch, 1)), -1, 0
    for depth in range(depths):
        flat = (beam_BW[:, :, None] + drafts.log_p[:, depth, None, :]).reshape(batch, -1)
        beam_BW, best_BW = jax.lax.top_k(flat, min(nodes, flat.shape[1]))
        score.append(beam_BW)
        tokens.append(jnp.take_along_axis(drafts.candidates[:, depth], best_BW % branches, axis=1))
        parents.append(best_BW // branches + offset)
        offset, first = first, first + beam_BW.shape[1]
    depth_W = jnp.concatenate([jnp.full(x.shape[1], depth + 1, jnp.int32) for depth, x in enumerate(score)])
    # Earlier depths come first, and `top_k` is stable: a child never displaces its parent.
    best_BQ = jax.lax.top_k(jnp.concatenate(score, axis=1), nodes)[1]
    best_BQ = jnp.sort(best_BQ, axis=1)
    parent_BQ = jnp.take_along_axis(jnp.concatenate(parents, axis=1), best_BQ, axis=1)
    row_BQ = jnp.argmax(best_BQ[:, None, :] == parent_BQ[:, :, None], axis=2) + 1
    valid = jnp.broadcast_to(drafts.drafted[:, None], best_BQ.shape)
    return Nodes(
        tokens=jnp.take_along_axis(jnp.concatenate(tokens, axis=1), best_BQ, axis=1),
        parents=jnp.where(parent_BQ < 0, 0, row_BQ).astype(jnp.int32),
        depths=depth_W[best_BQ],
        valid=valid,
        confidence=jnp.zeros(best_BQ.shape),
        certain=jnp.ones_like(drafts.drafted),
    )


def ancestors(nodes: Nodes) -> jax.Array:
    """[B, 1 + Q, 1 + Q] bool: [b, i, j] is whether row j is row i or its ancestor. Every row descends from row 0."""
    batch, count = nodes.tokens.shape
    itself = jnp.eye(count + 1, dtype=bool)[None]
    parents_BN = jnp.concatenate([jnp.zeros((batch, 1), jnp.int32), nodes.parents], axis=1)
    reached = itself | (parents_BN[:, :, None] == jnp.arange(count + 1))
    span = 1
    while span < count:  # each iteration adds the ancestors of all known ancestors
        reached = (reached.astype(jnp.float32) @ reached.astype(jnp.float32)) > 0
        span *= 2
    return reached


def anchors(nodes: Nodes, ancestors_BNN: jax.Array, count: int) -> jax.Array:
    """[B, count] int32: the rows where acceptance most probably ends, given the confidence of the nodes."""
    batch, length = nodes.confidence.shape
    if count == length + 1:
        return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    confidence_BN = jnp.concatenate([jnp.ones((batch, 1)), nodes.confidence], axis=1)
    reached_BN = jnp.where(ancestors_BNN, confidence_BN[:, None, :], 1.0).prod(axis=2)
    is_child = nodes.parents[:, None, :] == jnp.arange(length + 1)[:, None]
    next_BN = jnp.where(is_child, nodes.confidence[:, None, :], 0.0).max(axis=2)
    return jax.lax.top_k(reached_BN * (1 - next_BN), count)[1]


def most_probable(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the `count` most probable (tokens, log-probabilities) [..., count], in order.

    Takes repeated maxima, because on CPU `top_k` sorts the vocabulary.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    token_V = jnp.arange(logits.shape[-1])
    tokens, values = [], []
    for _ in range(count):
        best = log_p.argmax(axis=-1)
        tokens.append(best.astype(jnp.int32))
        values.append(log_p.max(axis=-1))
        log_p = jnp.where(token_V == best[..., None], -jnp.inf, log_p)
    return jnp.stack(tokens, axis=-1), jnp.stack(values, axis=-1)


def no_nodes(like_B: jax.Array, count: int) -> Nodes:
    """Returns a chain of `count` invalid nodes for each row of `like_B`."""
    zeros = jnp.zeros((len(like_B), count), jnp.int32)
    return chain_nodes(Drafts(zeros, jnp.zeros_like(like_B, bool), zeros.astype(jnp.float32)))
