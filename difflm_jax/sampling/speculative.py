"""Speculative decoding: an adapter drafts, its base verifies, and the text is the base's own (Uno, arXiv:2609.04010).

One jitted loop; a cycle of it is the same for every strategy (`drafts.Drafting`):

  draft   two_pass and tree: rows [last token, m noise rows], with the adapter on for the noise rows only. Row 0 gives
          the base's next token; the noise rows give drafts of the m tokens after it.
  verify  rows [last token, proposed tokens] of the base. The accepted path and one token of the base are kept. In
          one_pass and likeliest, noise rows follow the places where acceptance may end, to draft for the next pass.

Plain decoding is a cycle without proposals. Rows have different lengths and do not depend on each other. Every draw
uses a key of its row and pass, because a second draw for a position must be independent of the rejected one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.distributed.collectives import everywhere, varying_with
from difflm_jax.sampling import drafts, lookup, verification
from difflm_jax.sampling.columns import Rows
from difflm_jax.sampling.drafts import Drafting, Drafts, Nodes
from difflm_jax.sampling.grammar.bits import where_allowed
from difflm_jax.sampling.options import Sampling
from difflm_jax.sampling.proposal import draw, drawn_from, noise
from difflm_jax.sampling.verification import Accepted

DRAFT_STREAM, NOISE_STREAM = 4, 7
UNLIMITED = 2**31 - 1


@struct.dataclass
class Carry:
    """State between two cycles. The cache contains the columns of all known tokens but the last."""

    tokens: jax.Array  # [B, T] int32, known up to `lengths`
    lengths: jax.Array  # [B] int32
    done: jax.Array  # [B] bool
    passes: jax.Array  # [B] int32, forward passes that the row took part in
    verified: jax.Array  # [B] int32, passes that verified proposals
    accepted: jax.Array  # [B, deepest] int32, passes that accepted at least 1, 2, ... proposals
    drafts: Drafts | None
    cache: Any

    def slim(self) -> "Carry":
        """Drops the fields that only further cycles need."""
        return self.replace(cache=None, drafts=None)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The model as the loop sees it (`columns.ColumnModel`), so that tests can pass a scripted one."""

    predict: Callable[[Any, Rows], tuple[jax.Array, Any]]  # (cache, rows) -> (logits [B, N, V], keys and values)
    write: Callable[[Any, Any, jax.Array], Any]  # (cache, keys and values, first columns [B]) -> cache


@dataclasses.dataclass(frozen=True)
class Loop:
    """The constants of all passes, and the body of a cycle."""

    model: Predictor
    drafting: Drafting
    sampling: Sampling
    limits: jax.Array  # [B] int32, maximum tokens of each row, prompt included
    keys: jax.Array  # [B]
    vocabulary: int
    mask_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def start(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Any) -> Carry:
        """Returns the carry before the first cycle; `cache` contains the columns of the prompts."""
        zeros_B = varying_with(jnp.zeros(lengths_B.shape, jnp.int32), tokens_BT)
        accepted = jnp.zeros((len(lengths_B), self.drafting.deepest), jnp.int32)
        return Carry(
            tokens=tokens_BT,
            lengths=lengths_B,
            done=lengths_B >= self.limits,
            passes=zeros_B,
            verified=zeros_B,
            accepted=varying_with(accepted, tokens_BT),
            drafts=self._no_drafts(tokens_BT),
            cache=cache,
        )

    def run(self, carry: Carry, most: jax.Array | int = UNLIMITED) -> Carry:
        """Runs cycles until every row has ended, at most `most` of them."""

        def unfinished(state: tuple[Carry, jax.Array]) -> jax.Array:
            return ~everywhere(state[0].done.all()) & (state[1] < most)

        def cycle(state: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
            return self.cycle(state[0]), state[1] + 1

        return jax.lax.while_loop(unfinished, cycle, (carry, jnp.zeros((), jnp.int32)))[0]

    def cycle(self, carry: Carry) -> Carry:
        """Runs at most one drafting pass and one verifying pass."""
        return self.verify(self.draft(carry))

    def draft(self, carry: Carry, allowed_B1W: jax.Array | None = None) -> Carry:
        """Runs the drafting pass if the strategy has one and a row needs it.

        `allowed_B1W`: the tokens that may come next (`difflm_jax.sampling.grammar.bits`); None: all.
        """
        if not self.drafting.drafts_first:
            return carry
        needs_B = self.needs_drafts(carry)
        nobody = everywhere(~needs_B.any())
        return jax.lax.cond(nobody, lambda carry, *_: carry, self._draft_pass, carry, needs_B, allowed_B1W)

    def verify(self, carry: Carry, allowed_BNW: jax.Array | None = None) -> Carry:
        """Runs the verifying pass. `allowed_BNW`: tokens that may follow the last token and each of `nodes(carry)`."""
        predicted = self.model.predict(carry.cache, self.rows_to_verify(carry))
        return self.verified(carry, *predicted, allowed_BNW)

    def _draft_pass(self, carry: Carry, needs_B: jax.Array, allowed_B1W: jax.Array | None) -> Carry:
        predicted = self.model.predict(carry.cache, self.rows_to_draft(carry))
        return self.drafted(carry, needs_B, *predicted, allowed_B1W)

    # The rows of a pass and the handling of its results are separate functions, because a server runs rows of several
    # sets of options in one pass.

    def needs_drafts(self, carry: Carry) -> jax.Array:
        """[B] bool: the rows that need a drafting pass."""
        needs_B = ~carry.done
        if self.drafting.lookup:
            needs_B &= ~lookup.looked_up(carry.tokens, carry.lengths, 1)[1]
        return needs_B

    def rows_to_draft(self, carry: Carry) -> Rows:
        """The rows of a drafting pass: the last token, and noise after it."""
        keys_B = self._keys(carry)
        length = self.drafting.length
        last_B1 = _last(carry)
        step = jnp.arange(length + 1)
        batch = len(last_B1)
        return Rows(
            tokens=jnp.concatenate([last_B1, self._noise(keys_B, length)], axis=1),
            positions=carry.lengths[:, None] - 1 + step,
            sees=jnp.broadcast_to(step <= step[:, None], (batch, length + 1, length + 1)),
            lengths=carry.lengths - 1,
            gate=jnp.broadcast_to(step > 0, (batch, length + 1)),
        )

    def drafted(
        self, carry: Carry, needs_B: jax.Array, logits: jax.Array, kept: Any, allowed_B1W: jax.Array | None = None
    ) -> Carry:
        """Appends the base's next token and stores the drafts after it, for the rows that need them."""
        keys_B = self._keys(carry)
        own = draw(self._drawn_from(logits[:, :1], allowed_B1W), keys_B if self._draws else None)
        # A row that needs no drafts writes its last token's column, too; the verifying pass overwrites it.
        cache = self.model.write(carry.cache, jax.tree.map(lambda x: x[..., :1, :], kept), carry.lengths - 1)
        new = self._drafts(self._drawn_from(logits[:, 1:]), keys_B, needs_B)
        carry = carry.replace(cache=cache, drafts=new, passes=carry.passes + needs_B)
        return self._append(carry, own, needs_B.astype(jnp.int32))

    def rows_to_verify(self, carry: Carry) -> Rows:
        """The rows of a verifying pass: the last token, the proposed tokens, and noise where acceptance may end."""
        nodes = self.nodes(carry)
        ancestors = drafts.ancestors(nodes)
        return self._rows(carry, nodes, ancestors, self._anchors(nodes, ancestors), self._keys(carry))

    def verified(self, carry: Carry, logits: jax.Array, kept: Any, allowed_BNW: jax.Array | None = None) -> Carry:
        """Accepts proposals, appends the base's own token, and stores drafts for the next pass if there are any."""
        keys_B = self._keys(carry)
        nodes = self.nodes(carry)
        ancestors = drafts.ancestors(nodes)
        anchors = self._anchors(nodes, ancestors)
        count = 1 + nodes.tokens.shape[1]
        own = self._drawn_from(logits[:, :count], allowed_BNW)
        accepted = self._accept(carry, nodes, ancestors, own, keys_B)

        active_B = ~carry.done
        kept = jax.tree.map(lambda x: _along_path(x, accepted.path, self.drafting), kept)
        cache = self.model.write(carry.cache, kept, carry.lengths - 1)
        new = carry.drafts
        if anchors is not None:
            groups = self._drawn_from(logits[:, count:])
            groups = groups.reshape(len(keys_B), anchors.shape[1], self.drafting.length, -1)
            at_end = anchors == accepted.end[:, None]
            group_B = jnp.argmax(at_end, axis=1)
            of_end = jnp.take_along_axis(groups, group_B[:, None, None, None], axis=1)[:, 0]
            new = self._drafts(of_end, keys_B, at_end.any(axis=1))
        elif carry.drafts is not None:
            new = carry.drafts.replace(drafted=jnp.zeros_like(carry.done))
        had_any_B = active_B & nodes.valid.any(axis=1) if count > 1 else jnp.zeros_like(active_B)
        depth = jnp.arange(1, self.drafting.deepest + 1)
        carry = carry.replace(
            cache=cache,
            drafts=new,
            passes=carry.passes + active_B,
            verified=carry.verified + had_any_B,
            accepted=carry.accepted + (had_any_B[:, None] & (accepted.count[:, None] >= depth)),
        )
        return self._append(carry, accepted.emitted(nodes), jnp.where(active_B, accepted.count + 1, 0))

    def nodes(self, carry: Carry) -> Nodes:
        """The tokens that the next verifying pass verifies."""
        drafting, text = self.drafting, (carry.tokens, carry.lengths)
        if drafting.strategy == "tree":
            nodes = drafts.tree_nodes(carry.drafts, drafting.num_nodes)
        elif carry.drafts is not None:
            nodes = drafts.chain_nodes(carry.drafts)
        else:
            nodes = drafts.no_nodes(carry.done, drafting.num_nodes)
        if drafting.beside:
            return lookup.with_branch(nodes, *text, drafting.beside)
        if not (drafting.lookup and drafting.num_nodes):
            return nodes
        suffixes = lookup.WITHOUT_DRAFTS if drafting.strategy == "lookup" else lookup.SUFFIXES
        return lookup.with_lookup(nodes, *text, suffixes)

    def proposals(self, carry: Carry) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens [B, m] that the next pass verifies, their probabilities [B, m], 0 where there is none).

        For a tree, they are the most probable token of each depth. Looked-up tokens replace drafts if there are any.
        """
        nodes = drafts.no_nodes(carry.done, self.drafting.length)
        if carry.drafts is not None:
            nodes = drafts.chain_nodes(carry.drafts)
        if self.drafting.lookup:
            nodes = lookup.with_lookup(nodes, carry.tokens, carry.lengths)
        return nodes.tokens, jnp.where(nodes.valid & ~carry.done[:, None], nodes.confidence, 0.0)

    def _anchors(self, nodes: Nodes, ancestors_BNN: jax.Array) -> jax.Array | None:
        count = self.drafting.num_anchors
        return drafts.anchors(nodes, ancestors_BNN, count) if count else None

    def _rows(self, carry: Carry, nodes: Nodes, ancestors_BNN, anchors_BG, keys_B) -> Rows:
        """The rows of a verifying pass: the last token, the proposed tokens, and noise after each anchor."""
        tokens = jnp.concatenate([_last(carry), nodes.tokens], axis=1)
        depths = jnp.concatenate([jnp.zeros_like(carry.lengths)[:, None], nodes.depths], axis=1)
        first_B1 = carry.lengths[:, None] - 1
        if anchors_BG is None:
            return Rows(tokens, first_B1 + depths, ancestors_BNN, carry.lengths - 1)
        batch, count = tokens.shape
        groups, length = anchors_BG.shape[1], self.drafting.length
        step_M = jnp.arange(groups * length)
        anchor_BM = jnp.repeat(anchors_BG, length, axis=1)
        sees_rows = jnp.take_along_axis(ancestors_BNN, anchor_BM[:, :, None], axis=1)
        own = (step_M // length == (step_M // length)[:, None]) & (step_M <= step_M[:, None])
        own = jnp.broadcast_to(own, (batch, *own.shape))
        unseen = jnp.zeros((batch, count, groups * length), bool)
        sees = jnp.concatenate(
            [jnp.concatenate([ancestors_BNN, unseen], axis=2), jnp.concatenate([sees_rows, own], axis=2)], axis=1
        )
        depth_BM = jnp.take_along_axis(depths, anchor_BM, axis=1) + 1 + step_M % length
        return Rows(
            tokens=jnp.concatenate([tokens, self._noise(keys_B, groups * length)], axis=1),
            positions=first_B1 + jnp.concatenate([depths, depth_BM], axis=1),
            sees=sees,
            lengths=carry.lengths - 1,
            gate=jnp.broadcast_to(jnp.arange(count + groups * length) >= count, sees.shape[:2]),
        )

    def _accept(self, carry: Carry, nodes: Nodes, ancestors_BNN, logits_BNV, keys_B) -> Accepted:
        if self._draws and carry.drafts is not None and carry.drafts.logits is not None:
            return verification.by_rejection(nodes, carry.drafts, logits_BNV, keys_B)
        choices = draw(logits_BNV, keys_B if self._draws else None)
        return verification.by_choice(nodes, ancestors_BNN, choices, self.drafting.deepest)

    def _append(self, carry: Carry, tokens_BE: jax.Array, counts_B: jax.Array) -> Carry:
        """Appends the first `counts_B` of `tokens_BE` to each row, up to an end of sequence or the row's limit."""
        is_eos = jnp.isin(tokens_BE, jnp.array(self.eos_token_ids, jnp.int32)) & self.sampling.stop_at_eos
        step = jnp.arange(tokens_BE.shape[1])
        ends = is_eos & (step < counts_B[:, None])
        counts_B = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1) + 1, counts_B)
        counts_B = jnp.minimum(counts_B, self.limits - carry.lengths)
        ended_B = (ends & (step < counts_B[:, None])).any(axis=1)
        put = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0))
        tokens = put(carry.tokens, tokens_BE, carry.lengths)
        lengths = carry.lengths + counts_B
        return carry.replace(tokens=tokens, lengths=lengths, done=carry.done | ended_B | (lengths >= self.limits))

    def _drawn_from(self, logits: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
        """Logits of the distributions that tokens are drawn from; the mask token has probability 0."""
        if allowed is not None:
            logits = where_allowed(logits, allowed)
        token_V = jnp.arange(logits.shape[-1])
        if self.mask_token_id is not None:
            logits = jnp.where(token_V == self.mask_token_id, -jnp.inf, logits)
        if self.sampling.eos_penalty is not None:
            is_eos = jnp.isin(token_V, jnp.array(self.eos_token_ids, jnp.int32))
            logits = jnp.where(is_eos, logits - self.sampling.eos_penalty, logits)
        return drawn_from(logits, self.sampling)

    def _drafts(self, logits_BmV: jax.Array, keys_B: jax.Array, drafted_B: jax.Array) -> Drafts:
        if self.drafting.strategy == "tree":
            candidates, log_p = drafts.most_probable(logits_BmV, self.drafting.branches)
            return Drafts(candidates[..., 0], drafted_B, jnp.exp(log_p[..., 0]), None, candidates, log_p)
        noisy = logits_BmV
        if self._draws:
            noisy = logits_BmV + noise(jax.random.gumbel, keys_B, DRAFT_STREAM, logits_BmV.shape[1:], mode="high")
        tokens = noisy.argmax(axis=-1).astype(jnp.int32)
        own = jnp.take_along_axis(logits_BmV, tokens[..., None], axis=-1)[..., 0]
        confidence = jnp.exp(own - jax.nn.logsumexp(logits_BmV, axis=-1))
        return Drafts(tokens, drafted_B, confidence, logits_BmV if self._draws else None)

    def _no_drafts(self, tokens_BT: jax.Array) -> Drafts | None:
        """Empty drafts of the right shapes for the first cycle; None if the strategy has no drafts."""
        if self.drafting.strategy in ("plain", "lookup"):
            return None
        batch, length = tokens_BT.shape[0], self.drafting.length
        shapes = jax.eval_shape(
            self._drafts,
            jax.ShapeDtypeStruct((batch, length, self.vocabulary), jnp.float32),
            self.keys,
            jax.ShapeDtypeStruct((batch,), bool),
        )
        return jax.tree.map(lambda x: varying_with(jnp.zeros(x.shape, x.dtype), tokens_BT), shapes)

    def _noise(self, keys_B: jax.Array, count: int) -> jax.Array:
        """[B, count] int32 tokens for the noise rows."""
        if self.drafting.noise is not None:
            return jnp.full((len(keys_B), count), self.drafting.noise, jnp.int32)
        return noise(jax.random.randint, keys_B, NOISE_STREAM, (count,), minval=0, maxval=self.vocabulary)

    def _keys(self, carry: Carry) -> jax.Array:
        """One key per row and pass, derived as in the diffusion sampler under causal attention."""
        return jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, number), 0))(
            self.keys, carry.passes
        )

    @property
    def _draws(self) -> bool:
        return self.sampling.temperature is not None


def _last(carry: Carry) -> jax.Array:
    """[B, 1] the last known token of each row."""
    return jnp.take_along_axis(carry.tokens, carry.lengths[:, None] - 1, axis=1)


def _along_path(kept: jax.Array, path_BE: jax.Array, drafting: Drafting) -> jax.Array:
    """Keys or values [N, B, K, rows, E] of the accepted path, in order. For a chain these are the first rows."""
    if not drafting.branches_out:
        return kept[..., : path_BE.shape[1], :]
    return jnp.take_along_axis(kept, path_BE[None, :, None, :, None], axis=3)
