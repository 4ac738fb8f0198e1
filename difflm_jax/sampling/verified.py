"""Speculative decoding with diffusion drafts: a converted model drafts, its causal base verifies.

A cycle of `DiffusionLoop` fills a block of masks after the known text with diffusion passes. Then the base verifies the
block in one pass, keeps its longest matching prefix, and adds one token of its own. The text is the base's.

To the drafter the known text is a prompt. Under the attention rules "prefix", "block" and "causal_context", a prompt's
keys and values do not depend on what follows it. So both caches are exact: a draft runs only the masks and the tokens
that are new since the last draft. Drafts are the most probable tokens at any temperature. The base draws, and accepts a
draft that equals its own draw.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.distributed.collectives import varying_with
from difflm_jax.errors import UserError
from difflm_jax.sampling.columns import ColumnModel, Rows
from difflm_jax.sampling.commit import most_confident
from difflm_jax.sampling.drafts import Drafting, Drafts
from difflm_jax.sampling.options import Sampling
from difflm_jax.sampling.speculative import Carry, Loop, Predictor

DRAFT_LENGTH = 8  # default masks after the known text, if neither the options nor the attention rule sets it


def diffusion_drafting(diffusion: DiffusionConfig, sampling: Sampling) -> Drafting:
    """Returns how a converted model drafts for its base. Raises `UserError`."""
    length = sampling.draft_length or diffusion.block_length or DRAFT_LENGTH
    if diffusion.block_length and length > diffusion.block_length:
        raise UserError(f"draft_length={length}: this model fills blocks of {diffusion.block_length} tokens")
    passes = sampling.draft_passes or 1
    if passes > length:
        raise UserError(f"draft_passes={passes}: a draft has {length} tokens, and each pass commits at least one")
    return Drafting("two_pass", length, lookup=False, passes=passes)


@struct.dataclass
class Caches:
    """Columns of both models. The drafter's are final for the first `known` tokens of each row."""

    base: Any
    drafter: Any
    known: jax.Array  # [B] int32


def verifier(base: ColumnModel) -> Predictor:
    """Returns the base as the loop's `Predictor`, over its part of `Caches`."""

    def predict(caches: Caches, rows: Rows) -> tuple[jax.Array, Any]:
        return base.predict(caches.base, rows)

    def write(caches: Caches, kept: Any, starts_B: jax.Array) -> Caches:
        return caches.replace(base=base.write(caches.base, kept, starts_B))

    return Predictor(predict, write)


@dataclasses.dataclass(frozen=True)
class DiffusionLoop(Loop):
    """A `Loop` that drafts with `drafting.passes` diffusion passes of `drafter`.

    The drafter is another model, or the same one with an adapter.
    """

    drafter: ColumnModel
    diffusion: DiffusionConfig  # the drafter's

    def _draft_pass(self, carry: Carry, needs_B: jax.Array, allowed_B1W: jax.Array | None) -> Carry:
        caches, length, passes = carry.cache, self.drafting.length, self.drafting.passes
        masks_Bm = jnp.full((len(needs_B), length), self.diffusion.mask_token_id, jnp.int32)
        confidence_Bm = jnp.zeros(masks_Bm.shape)
        kept, per_pass = None, -(-length // passes)
        tokens_Bm = masks_Bm
        for number in range(passes):
            logits_BmV, kept = self._predictions(caches, carry, tokens_Bm)
            open_Bm = tokens_Bm == self.diffusion.mask_token_id
            best_Bm = logits_BmV.argmax(axis=-1).astype(jnp.int32)
            probable_Bm = jnp.exp(logits_BmV.max(axis=-1) - jax.nn.logsumexp(logits_BmV, axis=-1))
            quota_B = jnp.full(len(needs_B), per_pass if number + 1 < passes else length)
            commit_Bm = most_confident(probable_Bm, open_Bm, quota_B)
            tokens_Bm = jnp.where(commit_Bm, best_Bm, tokens_Bm)
            confidence_Bm = jnp.where(commit_Bm, probable_Bm, confidence_Bm)
        columns = self.drafter.write(caches.drafter, kept, caches.known)
        return carry.replace(
            cache=caches.replace(drafter=columns, known=jnp.where(needs_B, carry.lengths, caches.known)),
            drafts=Drafts(tokens_Bm, needs_B, confidence_Bm),
            passes=carry.passes + passes * needs_B,
        )

    def _predictions(self, caches: Caches, carry: Carry, masks_Bm: jax.Array) -> tuple[jax.Array, Any]:
        """Returns (logits [B, m, V] of the block after the known text, keys and values of the new text)."""
        batch, length = masks_Bm.shape
        new = self.drafting.deepest + 1  # the most tokens that a cycle adds
        column_BE = caches.known[:, None] + jnp.arange(new)
        is_text_BE = column_BE < carry.lengths[:, None]
        text_BE = jnp.take_along_axis(carry.tokens, jnp.minimum(column_BE, carry.tokens.shape[1] - 1), axis=1)
        step = jnp.arange(new + length)
        is_mask = step >= new
        # A token of the text sees the text up to itself; a mask sees all the text and the whole block.
        by_rule = jnp.where(is_mask[:, None], True, (step <= step[:, None]) & ~is_mask)
        is_real = jnp.concatenate([is_text_BE, jnp.ones((batch, length), bool)], axis=1)
        rows = Rows(
            tokens=jnp.concatenate([text_BE, masks_Bm], axis=1),
            positions=jnp.concatenate([column_BE, carry.lengths[:, None] + jnp.arange(length)], axis=1),
            sees=by_rule & is_real[:, None, :],
            lengths=caches.known,
        )
        at_Bm = jnp.broadcast_to(new + jnp.arange(length), (batch, length))
        if self.diffusion.shift:
            last_B1 = (carry.lengths - 1 - caches.known)[:, None]
            at_Bm = jnp.concatenate([last_B1, at_Bm[:, :-1]], axis=1)
        logits_BmV, kept = self.drafter.predict(caches.drafter, rows, at_Bm)
        return self._drawn_from(logits_BmV), jax.tree.map(lambda x: x[..., :new, :], kept)

    def _no_drafts(self, tokens_BT: jax.Array) -> Drafts:
        zeros_Bm = varying_with(jnp.zeros((len(tokens_BT), self.drafting.length), jnp.int32), tokens_BT)
        return Drafts(zeros_Bm, zeros_Bm[:, 0] > 0, zeros_Bm.astype(jnp.float32))
