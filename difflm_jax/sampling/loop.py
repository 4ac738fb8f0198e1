"""The sampler: one jitted loop over a typed carry that starts from masks and commits the most confident tokens.

A pass is: logits of the active block -> a proposal (`proposal`) -> which masks it commits (`commit`, ranked by
`confidence`, as many as `schedule` says) -> which committed tokens it remasks or replaces (`revise`). The loop sees the
model only as a function `predict`, so tests can pass a scripted one. Rows of a batch do not depend on each other. Each
row has its own block and pass, and enters the next block as soon as it finishes the current one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.diffusion.config import columns_from
from difflm_jax.distributed.collectives import everywhere, varying_with
from difflm_jax.sampling import commit, revise
from difflm_jax.sampling.grammar.bits import where_allowed
from difflm_jax.sampling.options import Sampling
from difflm_jax.sampling.proposal import REMASK_STREAM, Proposal, noise, propose, seen_tokens
from difflm_jax.sampling.schedule import DEADLINE, time_of


@struct.dataclass
class Turn:
    """The block that each row is in at a pass."""

    first: jax.Array  # [B] int32, first column of the active block
    step: jax.Array  # [B] int32, passes that the row has made in it
    waits: jax.Array  # [B] bool, True where the row has nothing left to do in it
    finished: jax.Array  # [B] bool, True where the row has nothing left to do at all


# (cache, tokens [B, L], turn) -> (float32 logits [B, block_length, V] of the active blocks, cache, answered [B] bool).
# A row that is not answered takes no step: the pass only brought its cache up to date. None: all rows are answered.
Predict = Callable[[Any, jax.Array, Turn], tuple[jax.Array, Any, jax.Array | None]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a generation: `num_blocks` blocks of `block_length` columns from column `first_column` on.

    Blocks are filled from left to right. `steps_per_block` is the largest number of scheduled passes that the compiled
    program takes; `Canvas.steps` may be smaller. With `steps_per_block=1` every block takes exactly one pass.
    """

    first_column: int
    num_blocks: int
    block_length: int
    steps_per_block: int
    in_step: bool = False  # rows enter a block together, so that a watcher sees one block at a time


@struct.dataclass
class Canvas:
    """A padded batch of rows that contain masks, and everything that is known before the first pass."""

    tokens: jax.Array  # [B, L] int32
    valid: jax.Array  # [B, L] bool, False at padding
    fillable: jax.Array  # [B, L] bool, the masks to fill
    prompt_lengths: jax.Array  # [B] int32, real tokens
    steps: jax.Array  # [B, J] int32, scheduled passes of each block; 0 where it has no mask
    quotas: jax.Array  # [B, J, P] int32, fewest masks to commit at each step (`schedule.quotas`)
    keys: jax.Array  # [B] one key per row


@struct.dataclass
class Carry:
    """State between two passes."""

    tokens: jax.Array  # [B, L] int32; a mask id where nothing is committed yet
    confidence: jax.Array  # [B, L] float32, probability of each token when it was committed, 0 elsewhere
    passes: jax.Array  # [B] int32, forward passes that the row used
    done: jax.Array  # [B] bool, True where the row has nothing left to do in the active block
    revisions: jax.Array  # [B] int32, passes since the active block was full
    block: jax.Array  # [B] int32, index of the active block; the number of blocks once the row is finished
    step: jax.Array  # [B] int32, passes made in the active block
    cache: Any  # the state of `predict`

    def slim(self) -> "Carry":
        """Drops the fields that only further passes need."""
        return self.replace(cache=None, block=None, step=None)


@struct.dataclass
class Attempt:
    """The result of a pass before it is applied to the active block."""

    proposal: Proposal
    commit: jax.Array  # [B, T] bool
    cache: Any
    answered: jax.Array | None = None  # [B] bool, see `Predict`


@dataclasses.dataclass(frozen=True)
class Loop:
    """The constants of all passes, and the body of the loop. The mask token is never produced."""

    predict: Predict
    canvas: Canvas
    plan: Plan
    sampling: Sampling
    mask_token_id: int
    eos_token_ids: tuple[int, ...]

    def start(self, cache: Any = None) -> Carry:
        """Returns the carry before the first pass; `cache` is the initial cache of `predict`."""
        tokens_BL = self.canvas.tokens
        zeros_B = varying_with(jnp.zeros(tokens_BL.shape[0], jnp.int32), tokens_BL)
        no_confidence_BL = varying_with(jnp.zeros(tokens_BL.shape), tokens_BL)
        first_B = jnp.where(self._open(tokens_BL).any(axis=1), 0, self.plan.num_blocks)
        return Carry(tokens_BL, no_confidence_BL, zeros_B, zeros_B > 0, zeros_B, first_B, zeros_B, cache)

    def finished(self, carry: Carry) -> jax.Array:
        """[B] bool, True where a row has nothing left to fill."""
        return carry.block >= self.plan.num_blocks

    def unfinished(self, carry: Carry) -> jax.Array:
        return ~everywhere(self.finished(carry).all())

    def run(self, carry: Carry) -> Carry:
        """Runs passes until nothing is left to fill."""
        return jax.lax.while_loop(self.unfinished, self.step, carry)

    def step(self, carry: Carry) -> Carry:
        """Runs one pass, then moves rows that are done with their block to the next one."""
        return self.observed_step(carry)[0]

    def observed_step(self, carry: Carry) -> tuple[Carry, Proposal]:
        """Like `step`; also returns the proposal for the block that was active."""
        attempt = self.attempt(carry)
        return self.settle(carry, attempt), attempt.proposal

    def attempt(self, carry: Carry, allowed_BTW: jax.Array | None = None) -> Attempt:
        """Runs the model and returns its proposal for the active block and the masks that the rule commits.

        `allowed_BTW`: the tokens allowed at each position (`difflm_jax.sampling.grammar.bits`); None: all.
        """
        open_BT, done_B, committed_BT = self._before(carry)
        turn = Turn(self._first(carry), carry.step, done_B, self.finished(carry))
        logits_BTV, cache, answered_B = self.predict(carry.cache, carry.tokens, turn)
        if allowed_BTW is not None:
            logits_BTV = where_allowed(logits_BTV, allowed_BTW)
        proposal = self._propose(carry.tokens, logits_BTV, self._keys(carry))
        confidence_BT = self._active(carry, carry.confidence)
        commit_BT = self._commit(carry, proposal, open_BT & ~done_B[:, None], committed_BT, confidence_BT)
        return Attempt(proposal, commit_BT, cache, answered_B)

    def settle(self, carry: Carry, attempt: Attempt) -> Carry:
        """Applies `attempt`: its commits and revisions, and the move to the next block. Returns the new carry."""
        proposal, (open_BT, done_B, committed_BT) = attempt.proposal, self._before(carry)
        used_B = ~done_B if attempt.answered is None else ~done_B & attempt.answered
        open_BT, committed_BT, commit_BT = (x & used_B[:, None] for x in (open_BT, committed_BT, attempt.commit))
        first_B = self._first(carry)

        def put(x_BL: jax.Array, x_BT: jax.Array) -> jax.Array:
            return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(x_BL, x_BT, first_B, 0)

        tokens_BT, confidence_BT = self._active(carry, carry.tokens), self._active(carry, carry.confidence)
        keys_B = self._keys(carry)
        edit_BT, remask_BT = self._revise(carry, proposal, tokens_BT, committed_BT, confidence_BT, keys_B)
        write_BT = commit_BT | edit_BT
        tokens_BT = jnp.where(write_BT, proposal.tokens, jnp.where(remask_BT, self.mask_token_id, tokens_BT))
        confidence_BT = jnp.where(write_BT, proposal.probability, jnp.where(remask_BT, 0.0, confidence_BT))
        tokens_BL = put(carry.tokens, tokens_BT)

        was_full_B = ~open_BT.any(axis=1) & used_B
        revisions_B = jnp.where(carry.step == 0, 0, carry.revisions) + was_full_B
        open_BL = self._open(tokens_BL)
        settled_B = ~self._active(carry, open_BL).any(axis=1)
        if self.sampling.edit_threshold is not None:
            settled_B &= was_full_B & (~edit_BT.any(axis=1) | (revisions_B >= self.sampling.edit_passes))
        if self.sampling.remask is not None:
            settled_B = jnp.zeros_like(done_B)  # remasking may reopen a full block until its last pass
        done_B |= used_B & (settled_B | (carry.step + 1 >= self._limit(carry.block)))
        leave_B = everywhere(done_B.all()) & done_B if self.plan.in_step else done_B
        next_B = jnp.where(open_BL.any(axis=1), carry.block + 1, self.plan.num_blocks)
        return Carry(
            tokens=tokens_BL,
            confidence=put(carry.confidence, confidence_BT),
            passes=carry.passes + used_B,
            done=done_B & ~leave_B,
            revisions=revisions_B,
            block=jnp.where(leave_B, jnp.minimum(next_B, self.plan.num_blocks), carry.block),
            step=jnp.where(leave_B, 0, carry.step + used_B),
            cache=attempt.cache,
        )

    def _first(self, carry: Carry) -> jax.Array:
        """[B] the first column of the active block; of the last block where a row is finished."""
        return self.plan.first_column + self._place(carry.block) * self.plan.block_length

    def _place(self, block_B: jax.Array) -> jax.Array:
        return jnp.minimum(block_B, self.plan.num_blocks - 1)

    def _active(self, carry: Carry, x_BL: jax.Array) -> jax.Array:
        """[B, T] the columns of `x_BL` in the active block."""
        return columns_from(x_BL, self._first(carry), self.plan.block_length)

    def _before(self, carry: Carry) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the state before a pass, bool: (masks to fill [B, T], rows done [B], committed tokens [B, T])."""
        open_BT = self._active(carry, self._open(carry.tokens))
        done_B = jnp.where(carry.step == 0, ~open_BT.any(axis=1), carry.done) | self.finished(carry)
        fillable_BT, tokens_BT = self._active(carry, self.canvas.fillable), self._active(carry, carry.tokens)
        return open_BT, done_B, fillable_BT & (tokens_BT != self.mask_token_id) & ~done_B[:, None]

    def _keys(self, carry: Carry) -> jax.Array:
        return _step_keys(self.canvas.keys, carry.block, carry.step)

    def _open(self, tokens_BL: jax.Array) -> jax.Array:
        """[B, L] bool: masks to fill. With `stop_at_eos`, those after an end-of-sequence token are left out."""
        open_BL = self.canvas.fillable & (tokens_BL == self.mask_token_id)
        if not self.sampling.stop_at_eos:
            return open_BL
        in_answer_L = jnp.arange(tokens_BL.shape[1]) >= self.plan.first_column
        is_eos_BL = jnp.isin(tokens_BL, jnp.array(self.eos_token_ids, jnp.int32)) & in_answer_L
        return open_BL & (jnp.cumsum(is_eos_BL, axis=1) == 0)

    def _propose(self, tokens_BL: jax.Array, logits_BTV: jax.Array, keys_B: jax.Array) -> Proposal:
        seen_BV = None
        if self.sampling.repetition_penalty is not None:
            seen_BV = seen_tokens(
                tokens_BL, self.canvas.valid & (tokens_BL != self.mask_token_id), logits_BTV.shape[-1]
            )
        return propose(logits_BTV, seen_BV, keys_B, self.sampling, self.mask_token_id, self.eos_token_ids)

    def _commit(self, carry, proposal: Proposal, open_BT, committed_BT, confidence_BT) -> jax.Array:
        """[B, T] bool: the masks to commit under the rule that the options select."""
        sampling, quota_B = self.sampling, self._quota(carry, open_BT)
        score_BT = commit.leftmost_first(proposal.score, open_BT) if sampling.leftmost else proposal.score
        known = (score_BT, open_BT)
        if sampling.threshold is not None:
            return commit.above_threshold(*known, jnp.maximum(quota_B, 1), sampling.threshold)
        if sampling.factor is not None:
            return commit.within_factor(*known, jnp.maximum(quota_B, 1), sampling.factor)
        if sampling.entropy_bound is not None:
            return commit.within_entropy(*known, jnp.maximum(quota_B, 1), sampling.entropy_bound)
        if sampling.commits_by_rate:
            t_B1, s_B1 = self._times(carry)
            remask_BT = self._remask_rate(t_B1, s_B1, confidence_BT, committed_BT)
            return commit.by_rate(*known, revise.unmask_rate(remask_BT, t_B1, s_B1))
        return commit.most_confident(*known, quota_B)

    def _revise(self, carry, proposal: Proposal, tokens_BT, committed_BT, confidence_BT, keys_B):
        """Returns (committed tokens to replace, committed tokens to remask), both [B, T] bool."""
        nothing_BT = jnp.zeros_like(committed_BT)
        if self.sampling.edit_threshold is not None:
            edit_BT = revise.edited(
                tokens_BT, proposal.tokens, proposal.probability, committed_BT, self.sampling.edit_threshold
            )
            # The last pass edits nothing, so it can fill what an edit reopened.
            return edit_BT & (carry.step + 1 < self._limit(carry.block))[:, None], nothing_BT
        if self.sampling.remask is not None:
            rate_BT = self._remask_rate(*self._times(carry), confidence_BT, committed_BT)
            chance_BT = noise(jax.random.uniform, keys_B, REMASK_STREAM, committed_BT.shape[1:])
            return nothing_BT, committed_BT & (chance_BT < rate_BT)
        return nothing_BT, nothing_BT

    def _quota(self, carry: Carry, open_BT: jax.Array) -> jax.Array:
        """[B] the fewest masks that the pass commits; in the last scheduled pass, all of them."""
        if self.sampling.schedule == DEADLINE:
            return commit.deadline_quota(open_BT, self._passes_left(carry))
        steps_B = self._steps(carry.block)
        scheduled_B = jnp.minimum(carry.step, steps_B - 1)
        quota_B = self.canvas.quotas[jnp.arange(len(steps_B)), self._place(carry.block), scheduled_B]
        return jnp.where(scheduled_B == steps_B - 1, self.plan.block_length, quota_B)

    def _passes_left(self, carry: Carry) -> jax.Array:
        """[B] passes, this one included, that a deadline leaves a row that is at work in the active block."""
        steps_B, before_B = self._steps(carry.block), carry.passes - carry.step
        saved_B = jnp.maximum(self._steps_before(carry.block) - before_B, 0)
        return jnp.maximum(steps_B + saved_B - carry.step, 1)

    def _limit(self, block_B: jax.Array) -> jax.Array:
        """[B] maximum passes in a block. Under a deadline, a block may also use the passes of all earlier blocks."""
        before_B = self._steps_before(block_B) if self.sampling.schedule == DEADLINE else 0
        editing = self.sampling.edit_threshold is not None
        return self._steps(block_B) + before_B + (self.sampling.edit_passes + 1 if editing else 0)

    def _steps(self, block_B: jax.Array) -> jax.Array:
        """[B] scheduled passes of a block, 1 where it has no mask."""
        steps_B1 = jnp.take_along_axis(self.canvas.steps, self._place(block_B)[:, None], axis=1)
        return jnp.maximum(steps_B1[:, 0], 1)

    def _steps_before(self, block_B: jax.Array) -> jax.Array:
        """[B] scheduled passes of all earlier blocks."""
        return jnp.where(jnp.arange(self.plan.num_blocks) < block_B[:, None], self.canvas.steps, 0).sum(axis=1)

    def _times(self, carry: Carry) -> tuple[jax.Array, jax.Array]:
        """Returns the diffusion times before and after the pass, [B, 1] each."""
        steps_B1 = self._steps(carry.block)[:, None]
        scheduled_B1 = jnp.minimum(carry.step[:, None], steps_B1 - 1)
        return time_of(scheduled_B1, steps_B1), time_of(scheduled_B1 + 1, steps_B1)

    def _remask_rate(self, t: jax.Array, s: jax.Array, confidence_BT, committed_BT) -> jax.Array:
        if self.sampling.remask is None:
            return jnp.zeros(committed_BT.shape)
        return revise.remask_rates(self.sampling.remask, self.sampling.remask_eta, confidence_BT, committed_BT, t, s)


@jax.vmap
def _step_keys(key: jax.Array, block: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, block), step)
