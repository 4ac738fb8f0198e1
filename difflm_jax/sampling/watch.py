"""Sampling pass by pass: the sampler's own loop, with a watcher or a grammar.

The host steps the same loop body that `caches.fill` runs on the device, so the answers are the same. On a GPU they are
the same up to rounding, because other kernels compute the matmuls. Generation without a watcher costs nothing extra.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from difflm_jax.sampling.caches import Decoder, loop_over
from difflm_jax.sampling.confidence import log_odds
from difflm_jax.sampling.grammar.canvas import CanvasRow, masks_of
from difflm_jax.sampling.loop import Attempt, Canvas, Carry, Loop, Plan
from difflm_jax.sampling.options import Sampling
from difflm_jax.sampling.proposal import Proposal

ALTERNATIVES = 5


@dataclasses.dataclass(frozen=True)
class Pass:
    """The effect of a forward pass on the rows of a batch. T: columns after the prompts; k: most likely tokens kept.

    The columns of an infilled canvas begin at its first mask. In speculative decoding accepted tokens have
    confidence 1, and the candidates are the tokens that the next pass verifies (a mask where there is none).
    """

    rows: Sequence[int]  # indices of the rows among all inputs
    number: int  # from 1, in this batch
    prompts: list[np.ndarray]  # tokens of each row before column 0
    tokens: np.ndarray  # [rows, T] int32 after the pass; mask ids where nothing is committed
    real: np.ndarray  # [rows, T] bool, False where a row has ended
    confidence: np.ndarray  # [rows, T] float32, probability of each token when it was committed, 0 elsewhere
    written: np.ndarray  # [rows, T] bool, committed or replaced in this pass
    block: slice  # the columns that were active
    candidates: np.ndarray  # [rows, block, k] int32, the most likely tokens in the active block, before the pass
    probabilities: np.ndarray  # [rows, block, k] float32

    def guess(self, mask_token_id: int) -> np.ndarray:
        """[rows, T] int32: `tokens`, with the most likely token at each mask of the active block."""
        tokens = self.tokens.copy()
        active = tokens[:, self.block]
        tokens[:, self.block] = np.where(active == mask_token_id, self.candidates[..., 0], active)
        return tokens


Watcher = Callable[[Pass], None]


@dataclasses.dataclass(frozen=True)
class Host:
    """Host callbacks of each pass: grammars of all rows, and a watcher."""

    rows: Sequence[CanvasRow] | None = None
    watch: Watcher | None = None


def both(first: Watcher | None, second: Watcher) -> Watcher:
    """Returns a watcher that calls `first`, if given, then `second`."""
    if first is None:
        return second

    def tell(seen: Pass) -> None:
        first(seen)
        second(seen)

    return tell


def fill_stepwise(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling, rows: range, host: Host) -> Carry:
    """Runs `caches.fill` on one device, pass by pass, with grammars and a watcher.

    The first rows of `canvas` are the inputs with indices `rows`; the others are filler.
    """
    plan = dataclasses.replace(plan, in_step=True)
    known = (decoder, plan, canvas, sampling)
    carry, unfinished = _begin(decoder, plan, canvas, sampling)
    real_BT = canvas.valid[:, plan.first_column :]
    starts = [plan.first_column - int(length) for length in canvas.prompt_lengths]
    prompts = [np.asarray(canvas.tokens[i, starts[i] : plan.first_column]) for i in range(len(rows))]
    number, count = 0, len(rows)
    while bool(unfinished):
        before, block = np.asarray(carry.tokens), int(carry.block.min())
        if host.rows is None:
            carry, candidates, probabilities, unfinished = _one_pass(*known, carry)
        else:
            kept = host.rows[rows.start : rows.stop]
            carry, candidates, probabilities, unfinished = _pass_within(kept, *known, carry)
        after, number = np.asarray(carry.tokens), number + 1
        answer = np.s_[:count, plan.first_column :]
        if host.watch is None:
            continue
        host.watch(
            Pass(
                rows=rows,
                number=number,
                prompts=prompts,
                tokens=after[answer],
                real=real_BT[:count],
                confidence=np.asarray(carry.confidence)[answer],
                written=(after != before)[answer] & (after != decoder.diffusion.mask_token_id)[answer],
                block=slice(block * plan.block_length, (block + 1) * plan.block_length),
                candidates=np.asarray(candidates)[:count],
                probabilities=np.asarray(probabilities)[:count],
            )
        )
    return carry


def _pass_within(rows: Sequence[CanvasRow], decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling, carry):
    """Runs a pass whose commits obey the grammars. Returns the same as `_one_pass`."""
    first = plan.first_column + int(carry.block.min()) * plan.block_length
    block = slice(first, first + plan.block_length)
    tokens_BL = np.array(carry.tokens)
    allowed = masks_of(rows, tokens_BL, block, plan.first_column, decoder.model.config.vocab_size)
    attempt = _attempt(decoder, plan, canvas, sampling, carry, allowed)
    commit, tokens, score = (np.array(x) for x in (attempt.commit, attempt.proposal.tokens, attempt.proposal.score))
    for number, row in enumerate(rows):
        start = plan.first_column + row.offset
        columns = np.flatnonzero(commit[number])
        columns = columns[np.argsort(-score[number, columns], kind="stable")]
        places = columns + first - start
        inside = (places >= 0) & (places < row.most)  # a last block may be longer than the answer
        answer, noisy = tokens_BL[number, start : start + row.most], attempt.proposal.noisy[number]
        found = row.settled(
            answer, places[inside], tokens[number, columns[inside]], lambda at, x=noisy, to=start - first: x[at + to]
        )
        commit[number, columns[inside]] = False
        for place, token in found.items():
            commit[number, place + start - first], tokens[number, place + start - first] = True, token
    return _settle(decoder, plan, canvas, sampling, carry, attempt, commit, tokens)


@functools.partial(jax.jit, static_argnames="plan")
def _attempt(decoder, plan: Plan, canvas: Canvas, sampling: Sampling, carry: Carry, allowed_BTW: jax.Array) -> Attempt:
    return loop_over(decoder, plan, canvas, sampling)[0].attempt(carry, allowed_BTW)


@functools.partial(jax.jit, static_argnames="plan")
def _settle(decoder, plan, canvas, sampling, carry: Carry, attempt: Attempt, commit_BT, tokens_BT):
    loop, _ = loop_over(decoder, plan, canvas, sampling)
    probability_BT = jax.nn.sigmoid(log_odds(attempt.proposal.logits, tokens_BT, None))
    proposal = attempt.proposal.replace(tokens=tokens_BT, probability=probability_BT)
    carry = loop.settle(carry, attempt.replace(proposal=proposal, commit=commit_BT))
    return _observed(loop, carry, proposal)


@functools.partial(jax.jit, static_argnames="plan")
def _begin(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> tuple[Carry, Any]:
    loop, first_cache = loop_over(decoder, plan, canvas, sampling)
    start = loop.start(first_cache())
    return start, loop.unfinished(start)


@functools.partial(jax.jit, static_argnames="plan")
def _one_pass(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling, carry: Carry):
    loop, _ = loop_over(decoder, plan, canvas, sampling)
    return _observed(loop, *loop.observed_step(carry))


def _observed(loop: Loop, carry: Carry, proposal: Proposal) -> tuple[Carry, jax.Array, jax.Array, jax.Array]:
    """Returns (carry, the most likely tokens and their probabilities [B, T, k], whether passes are left)."""
    probabilities_BTV = jax.nn.softmax(proposal.logits, axis=-1)
    probabilities, candidates = jax.lax.top_k(probabilities_BTV, min(ALTERNATIVES, probabilities_BTV.shape[-1]))
    return carry, candidates, probabilities, loop.unfinished(carry)
