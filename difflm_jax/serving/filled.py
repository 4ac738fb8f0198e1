"""Rows of masks that diffusion fills. Each row has its own block and pass, so it may join at any pass.

A pass runs over the columns of its mode, and returns the logits of each row's active block:

  whole   the whole canvas, under any rule
  prompt  under `prefix` attention: the answer, with the cached columns of the prompt
  blocks  under `block`, `block_causal` and `causal` attention: one block, with the cached columns of finished ones.
          A finished block runs once more, while other rows are filled, to write its columns

Each row's logits are processed by `sampling.loop.Loop`, as a batch of one with the row's own options.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from difflm_jax.diffusion.config import Layout
from difflm_jax.models.attention import positions_of
from difflm_jax.sampling.columns import Columns, Rows
from difflm_jax.sampling.confidence import log_odds
from difflm_jax.sampling.loop import Attempt, Canvas, Carry, Loop, Plan
from difflm_jax.sampling.options import Sampling
from difflm_jax.serving import constrained
from difflm_jax.serving.beginnings import Prefill, empty_columns, insert_row, model_of, moved, write_after
from difflm_jax.serving.canvas import BLOCKS, PROMPT, WHOLE
from difflm_jax.serving.family import Weights
from difflm_jax.serving.table import (
    Table,
    biased,
    most_probable,
    room_bucket,
    rows_bucket,
    rows_with_nan,
    token_probability,
)
from difflm_jax.serving.work import Work


class Filled(Table):
    """A table of `CanvasRow`s of one width and mode; `is_guided`: those with `cfg_scale`."""

    def __init__(self, prefill: Prefill, mode: str, width: int, is_guided: bool, most_rows: int):
        super().__init__(most_rows)
        self._prefill, self._weights = prefill, prefill.weights
        self._mode, self._width, self._is_guided = mode, width, is_guided
        self._columns: Columns | None = None
        self._room, self._least = 0, Plan(1, 1, width, 1)

    def admit(self, work: Work) -> None:
        self._resize(work)
        slot = self.slots.index(None)
        if self._mode != WHOLE:
            one, work.row.cached = self._prefill(work.row.prefix, work.row.needed, work.index, self._room)
            self._columns = insert_row(self._columns, one, jnp.int32(slot))
        self.slots[slot] = work

    def release(self, work: Work) -> None:
        super().release(work)
        if not self.works:
            self.slots, self._columns, self._room, self._least = [], None, 0, Plan(1, 1, self._width, 1)

    def step(self) -> None:
        self._resize()
        plan = self._plan()
        rows, carry = self._rows(plan), self._carry(plan)
        place = self.per_row(_block_to_run, np.int32(0))
        scale = self.per_row(lambda work: work.request.sampling.cfg_scale, 0.0) if self._is_guided else None
        is_behind = place != carry.block
        asked = (rows, carry.tokens, place, is_behind, scale)
        logits, kept, starts = _looked(self._weights, plan, self._mode, asked, self._columns)
        if self._mode == BLOCKS:
            self._columns = write_after(self._columns, kept, starts, 0)
        bias = self.biases(logits.shape[-1])
        if bias is not None:
            logits = biased(logits, bias)
        starts = np.asarray(starts)
        for is_in, sampling in self.groups():
            active = is_in & ~is_behind
            step = (rows, sampling, logits, active)
            if any(self.slots[slot].row.grammar is not None for slot in np.flatnonzero(active)):
                carry, found = self._constrained(plan, carry, step)
            else:
                carry, found = _advanced(self._weights, plan, carry, step, self.candidates())
            self._take(jax.device_get((carry, found)), active, plan)
        if self._mode == BLOCKS:
            for slot, work in enumerate(self.slots):
                if work is not None:  # before a block is finished, only the token before it is final
                    work.row.written = int(starts[slot]) + work.row.shift + self._width * int(is_behind[slot])

    def _constrained(self, plan: Plan, carry: Carry, step: tuple) -> tuple[Carry, "Found"]:
        """`_advanced` for rows with grammars: between proposal and commit, the host applies the grammars."""
        *_, logits, active = step
        bits = constrained.allowed(self.slots, active, self._width, logits.shape[-1])
        attempt = _attempted(self._weights, plan, carry, step, bits)
        choice = constrained.settled(self.slots, active, attempt)
        return _settled(self._weights, plan, carry, step, (attempt, *choice), self.candidates())

    def _take(self, result: tuple[Carry, "Found"], active: np.ndarray, plan: Plan) -> None:
        """Copies the results of a pass to each active row of a group."""
        carry, found = result
        for slot in np.flatnonzero(active):
            work = self.slots[slot]
            row = work.row
            if found.is_nan[slot]:
                row.error = "the model computed a number that is not one (NaN)"
                continue
            own = slice(plan.first_column, plan.first_column + len(row.tokens))
            before, block = row.tokens, int(row.block)
            row.tokens, row.confidence = carry.tokens[slot, own].copy(), carry.confidence[slot, own].copy()
            row.passes, row.block, row.step = (int(x[slot]) for x in (carry.passes, carry.block, carry.step))
            row.block_done, row.revisions = bool(carry.done[slot]), int(carry.revisions[slot])
            row.done = not found.unfinished[slot]
            row.guess[:] = -1
            columns = np.arange(block * self._width, (block + 1) * self._width)
            row.guess[columns] = found.tokens[slot]
            if work.request.logprobs is None:
                continue
            for column in np.flatnonzero(row.tokens != before):
                at = (slot, column - columns[0])
                row.probabilities[column] = token_probability(work, row.tokens[column], found.probabilities, at)
            row.logprobs = row.all_probabilities()

    def _plan(self) -> Plan:
        """Returns the shape of a pass. Sizes that cost no time never shrink, to limit compilations."""
        rows, least = [work.row for work in self.works], self._least
        # One extra block, so that the first window does not start before the canvas.
        longest = max(self._width + 1 if self._mode == BLOCKS else 1, *(len(row.prefix) for row in rows))
        prompt, blocks = room_bucket(longest, 16), _blocks_bucket(max(row.num_blocks for row in rows))
        passes = max(least.steps_per_block, *(row.quotas.shape[1] for row in rows))
        if self._mode != WHOLE:
            prompt = max(prompt, least.first_column)
        if self._mode == BLOCKS:
            blocks = max(blocks, least.num_blocks)
        self._least = Plan(prompt, blocks, self._width, passes)
        return self._least

    def _rows(self, plan: Plan) -> "FilledRows":
        batch, first, blocks = len(self.slots), plan.first_column, plan.num_blocks
        valid = np.zeros((batch, first + blocks * self._width), bool)
        fillable = np.zeros_like(valid)
        steps = np.zeros((batch, blocks), np.int32)
        quotas = np.zeros((batch, blocks, plan.steps_per_block), np.int32)
        for slot, work in enumerate(self.slots):
            if work is None:
                valid[slot, first] = True  # attention needs at least one valid key
                continue
            row = work.row
            valid[slot, first - len(row.prefix) : first] = True
            valid[slot, first : first + len(row.valid)] = row.valid
            fillable[slot, first : first + len(row.valid)] = row.fillable
            steps[slot, : len(row.steps)] = row.steps
            quotas[slot, : len(row.steps), : row.quotas.shape[1]] = row.quotas
        prompts = self.per_row(lambda work: np.int32(len(work.row.prefix)), np.int32(0))
        keys = self.per_row(lambda work: work.row.key, np.zeros(2, np.uint32))
        index = self.per_row(lambda work: np.int32(work.index), np.int32(0))
        return FilledRows(valid, fillable, prompts, steps, quotas, keys, index)

    def _carry(self, plan: Plan) -> Carry:
        batch, columns = len(self.slots), plan.first_column + plan.num_blocks * self._width
        tokens = np.full((batch, columns), self._weights.decoder.pad_token_id, np.int32)
        confidence = np.zeros((batch, columns), np.float32)
        for slot, work in enumerate(self.slots):
            if work is None:
                continue
            row = work.row
            if len(row.prefix):
                tokens[slot, plan.first_column - len(row.prefix) : plan.first_column] = row.prefix
            own = slice(plan.first_column, plan.first_column + len(row.tokens))
            tokens[slot, own], confidence[slot, own] = row.tokens, row.confidence
        number = functools.partial(self.per_row, fill=np.int32(0))
        return Carry(
            tokens=tokens,
            confidence=confidence,
            passes=number(lambda work: np.int32(work.row.passes)),
            done=self.per_row(lambda work: work.row.block_done, True),
            revisions=number(lambda work: np.int32(work.row.revisions)),
            block=number(lambda work: np.int32(work.row.block)),
            step=number(lambda work: np.int32(work.row.step)),
            cache=None,
        )

    def _resize(self, new: Work | None = None) -> None:
        """Resizes the table to the rows and columns that its requests and `new` need."""
        works = [*self.works, *([] if new is None else [new])]
        chunk = self._prefill.chunk
        longest = max(len(work.row.prefix) + work.row.num_blocks * self._width for work in works)
        if self._mode == PROMPT:
            longest = max(len(work.row.prefix) for work in works)
        room = max(room_bucket(longest), -(-max(len(work.row.prefix) for work in works) // chunk) * chunk)
        room = max(room, self._room)
        batch = rows_bucket(len(works), self.most_rows)
        if batch == len(self.slots) and (self._mode == WHOLE or room == self._room):
            return
        used = [slot for slot, work in enumerate(self.slots) if work is not None]
        rows = np.array(used + [0] * (batch - len(used)), np.int32)
        if self._mode != WHOLE and self._columns is None:
            self._columns = empty_columns(self._weights, batch, room)
        elif self._mode != WHOLE:
            self._columns = moved(self._columns, rows, room)
        self.slots = [self.slots[slot] for slot in used] + [None] * (batch - len(used))
        self._room = room


def _block_to_run(work: Work) -> np.int32:
    """Returns the block to run: the active one, or the one before it if its columns are not written yet."""
    row = work.row
    if row.mode != BLOCKS:
        return np.int32(row.block)
    is_behind = row.written < len(row.prefix) + row.block * row.width - row.shift
    return np.int32(row.block - is_behind)


def _blocks_bucket(blocks: int) -> int:
    """Rounds a number of blocks up to one that is compiled for: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    return next(n for power in range(32) for n in (1 << power, 3 << power >> 1) if n >= max(blocks, 1))


@struct.dataclass
class FilledRows:
    """The constants of each row while it is filled. J: blocks."""

    valid: jax.Array  # [B, L] bool
    fillable: jax.Array  # [B, L] bool
    prompt_lengths: jax.Array  # [B] int32
    steps: jax.Array  # [B, J] int32
    quotas: jax.Array  # [B, J, passes] int32
    keys: jax.Array  # [B, 2] uint32
    index: jax.Array  # [B] int32, of the model in its family


@struct.dataclass
class Found:
    """The results of a pass for the active blocks of width T."""

    tokens: jax.Array  # [B, T] int32, proposed
    unfinished: jax.Array  # [B] bool
    is_nan: jax.Array  # [B] bool
    probabilities: tuple[jax.Array, ...] | None  # of `most_probable`


@functools.partial(jax.jit, static_argnames=("plan", "mode"))
def _looked(weights: Weights, plan: Plan, mode: str, asked: tuple, columns: Columns | None) -> tuple[Any, ...]:
    """Runs one block of each row through the model.

    Returns (logits [B, T, V] of block `place`, keys and values of the columns that ran, their first column [B]).
    `asked`: (rows, tokens [B, L], place [B], whether that block is finished [B], guidance [B] or None).
    """
    rows, tokens_BL, place_B, is_finished_B, scale_B = asked
    diffusion = weights.decoder.diffusion
    first_B = plan.first_column + place_B * plan.block_length - diffusion.shift
    predicting_BT = first_B[:, None] + jnp.arange(plan.block_length)  # columns whose states predict the block
    if mode == WHOLE:
        if diffusion.finished_is_prompt:
            rows = rows.replace(prompt_lengths=rows.prompt_lengths + place_B * plan.block_length)
        return _whole(weights, rows, tokens_BL, predicting_BT, scale_B), None, first_B
    positions_BL = positions_of(rows.valid)
    if mode == PROMPT:
        start_B, length = (
            jnp.full_like(first_B, plan.first_column - diffusion.shift),
            plan.num_blocks * plan.block_length,
        )
    else:
        start_B, length = first_B, plan.block_length
    step = jnp.arange(length + diffusion.shift)
    window_BT = start_B[:, None] + step
    valid_BT = jnp.take_along_axis(rows.valid, window_BT, axis=1)
    # The token before the block, which predicts its first one, is finished: within the window it sees only itself.
    sees_TT = (step >= diffusion.shift)[:, None] | (step == 0)
    sees_BTT = sees_TT & valid_BT[:, None]
    if diffusion.finished_is_prompt:
        sees_BTT &= ~is_finished_B[:, None, None] | (step <= step[:, None])
    known_B = jnp.maximum(rows.prompt_lengths + (start_B - plan.first_column), 0)
    model, gate = model_of(weights, rows.index, True)
    hidden, kept = model.states(
        columns,
        Rows(
            tokens=jnp.take_along_axis(tokens_BL, window_BT, axis=1),
            positions=jnp.take_along_axis(positions_BL, window_BT, axis=1),
            sees=sees_BTT | (step == step[:, None]),
            lengths=known_B,
            gate=gate,
        ),
    )
    hidden = jnp.take_along_axis(hidden, (predicting_BT - start_B[:, None])[..., None], axis=1)
    return weights.logits(hidden), kept, known_B


def _whole(weights: Weights, rows: FilledRows, tokens_BL, predicting_BT, scale_B: jax.Array | None) -> jax.Array:
    """Logits of a pass over the whole canvas. With guidance, every row has a twin whose given tokens are masked."""
    decoder = weights.decoder
    index_B, valid_BL, prompts_B = rows.index, rows.valid, rows.prompt_lengths
    if scale_B is not None:
        given_BL = rows.valid & ~rows.fillable
        tokens_BL = jnp.concatenate([tokens_BL, jnp.where(given_BL, decoder.diffusion.mask_token_id, tokens_BL)])
        index_B, valid_BL, prompts_B, predicting_BT = (
            jnp.concatenate([x, x]) for x in (index_B, valid_BL, prompts_B, predicting_BT)
        )
    layout = Layout(positions_of(valid_BL), valid_BL, prompts_B)
    variables, gate_BR = weights.of(index_B)
    gate = None if gate_BR is None else gate_BR[:, None]
    view = decoder.diffusion.view(layout)
    hidden = decoder.model.apply(variables, tokens_BL, layout.positions, view, gate_BT=gate)
    logits = weights.logits(jnp.take_along_axis(hidden, predicting_BT[..., None], axis=1))
    if scale_B is None:
        return logits
    with_prompt, without = jnp.split(logits, 2)
    return without + (scale_B[:, None, None] + 1) * (with_prompt - without)


@functools.partial(jax.jit, static_argnames=("plan", "candidates"))
def _advanced(weights: Weights, plan: Plan, carry: Carry, step: tuple, candidates: int | None) -> tuple[Carry, Found]:
    """Applies a pass to the active rows of one set of options. Returns (carry, results).

    `step`: (rows, options with a value per row, logits [B, T, V], active [B]).
    """
    rows, sampling, logits_BTV, active_B = step

    def one(carry: Carry, row: FilledRows, sampling: Sampling, logits_TV: jax.Array) -> tuple[Carry, Any, jax.Array]:
        loop, alone = _loop(weights, plan, carry, (row, sampling, logits_TV))
        after, proposal = loop.observed_step(alone)
        return _of_row(after), (proposal.tokens[0], proposal.logits[0]), loop.unfinished(after)

    after, (tokens, distributions), unfinished = jax.vmap(one)(carry, rows, sampling, logits_BTV)
    return _found(carry, after, (tokens, distributions, unfinished), (logits_BTV, active_B), candidates)


@functools.partial(jax.jit, static_argnames="plan")
def _attempted(weights: Weights, plan: Plan, carry: Carry, step: tuple, allowed_BTW: jax.Array) -> Attempt:
    """Returns the attempt of a pass on the active blocks, under the allowed tokens; `step` as in `_advanced`."""
    rows, sampling, logits_BTV, _ = step

    def one(carry: Carry, row: FilledRows, sampling: Sampling, logits_TV: jax.Array, allowed_TW: jax.Array) -> Attempt:
        loop, alone = _loop(weights, plan, carry, (row, sampling, logits_TV))
        attempt = loop.attempt(alone, allowed_TW[None])
        return Attempt(jax.tree.map(lambda x: x[0], attempt.proposal), attempt.commit[0], None)

    return jax.vmap(one)(carry, rows, sampling, logits_BTV, allowed_BTW)


@functools.partial(jax.jit, static_argnames=("plan", "candidates"))
def _settled(weights, plan: Plan, carry: Carry, step: tuple, choice: tuple, candidates: int | None):
    """Completes `_advanced` after an attempt. `choice`: (attempt, commit [B, T] bool, tokens [B, T])."""
    rows, sampling, logits_BTV, active_B = step
    attempt, commit_BT, tokens_BT = choice
    probability_BT = jax.nn.sigmoid(log_odds(attempt.proposal.logits, tokens_BT, None))
    proposal = attempt.proposal.replace(tokens=tokens_BT, probability=probability_BT)

    def one(carry: Carry, row: FilledRows, sampling: Sampling, logits_TV: jax.Array, attempt: Attempt) -> tuple:
        loop, alone = _loop(weights, plan, carry, (row, sampling, logits_TV))
        after = loop.settle(alone, jax.tree.map(lambda x: x[None], attempt))
        return _of_row(after), loop.unfinished(after)

    chosen = Attempt(proposal, commit_BT, None)
    after, unfinished = jax.vmap(one)(carry, rows, sampling, logits_BTV, chosen)
    return _found(carry, after, (tokens_BT, proposal.logits, unfinished), (logits_BTV, active_B), candidates)


def _loop(weights: Weights, plan: Plan, carry: Carry, of_row: tuple) -> tuple[Loop, Carry]:
    """Returns (loop, carry) of one row as a batch of one. `of_row`: (row, options, logits [T, V])."""
    row, sampling, logits_TV = of_row
    decoder = weights.decoder
    key = jax.random.wrap_key_data(row.keys)
    tokens, *batch = (
        x[None] for x in (carry.tokens, row.valid, row.fillable, row.prompt_lengths, row.steps, row.quotas, key)
    )
    loop = Loop(
        predict=lambda cache, *_: (logits_TV[None], cache, None),
        canvas=Canvas(tokens, *batch),
        plan=plan,
        sampling=sampling,
        mask_token_id=decoder.diffusion.mask_token_id,
        eos_token_ids=decoder.eos_token_ids,
    )
    return loop, jax.tree.map(lambda x: x[None], carry)


def _of_row(carry: Carry) -> Carry:
    """Removes the batch axis from the carry of a batch of one."""
    return jax.tree.map(lambda x: x[0], carry)


def _found(carry: Carry, after: Carry, proposed: tuple, step: tuple, candidates: int | None) -> tuple[Carry, Found]:
    """Returns (`after` in the active rows and `carry` in the others, the results of the pass)."""
    tokens, distributions, unfinished = proposed
    logits_BTV, active_B = step
    after = jax.tree.map(
        lambda new, old: jnp.where(active_B.reshape(-1, *[1] * (new.ndim - 1)), new, old), after, carry
    )
    found = None if candidates is None else most_probable(distributions, tokens, candidates)
    return after, Found(tokens, unfinished, rows_with_nan(logits_BTV), found)
