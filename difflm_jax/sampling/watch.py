"""Observed sampling: the passes of the sampler's own loop, run one by one, and what each of them did.

The host steps the body of the loop that `caches.fill` runs on the device, so the answers are the same. On a GPU they
are the same up to rounding, since other kernels compute the matmuls then. What is not watched costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from difflm_jax.sampling.caches import Decoder, loop_over
from difflm_jax.sampling.loop import Canvas, Carry, Plan
from difflm_jax.sampling.options import Sampling

ALTERNATIVES = 5


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward pass did to the rows of a batch. T: columns after the prompts; k: most likely tokens kept.

    The columns of an infilled canvas begin at its first mask.
    """

    rows: Sequence[int]  # places of the rows among all that were given
    number: int  # from 1, in this batch
    prompts: list[np.ndarray]  # tokens of each row before column 0
    tokens: np.ndarray  # [rows, T] int32 after the pass; mask ids where nothing is committed
    real: np.ndarray  # [rows, T] bool, False where a row has ended
    confidence: np.ndarray  # [rows, T] float32, probability of each token when it was committed, 0 elsewhere
    written: np.ndarray  # [rows, T] bool, committed or replaced in this pass
    block: slice  # the columns that were active
    candidates: np.ndarray  # [rows, block, k] int32, the likeliest tokens in the active block, before the pass
    probabilities: np.ndarray  # [rows, block, k] float32

    def guess(self, mask_token_id: int) -> np.ndarray:
        """[rows, T] int32: `tokens`, with the likeliest token at each mask of the active block."""
        tokens = self.tokens.copy()
        active = tokens[:, self.block]
        tokens[:, self.block] = np.where(active == mask_token_id, self.candidates[..., 0], active)
        return tokens


Watcher = Callable[[Pass], None]


def both(first: Watcher | None, second: Watcher) -> Watcher:
    """A watcher that tells `first`, if there is one, and `second`."""
    if first is None:
        return second

    def tell(seen: Pass) -> None:
        first(seen)
        second(seen)

    return tell


def fill_watched(
    decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling, rows: Sequence[int], watch: Watcher
) -> Carry:
    """`caches.fill` on one device, calling `watch` after every pass.

    The first rows of `canvas` are those at places `rows` of all; what follows is filler.
    """
    carry, unfinished = _begin(decoder, plan, canvas, sampling)
    real_BT = canvas.valid[:, plan.first_column :]
    starts = [plan.first_column - int(length) for length in canvas.prompt_lengths]
    prompts = [np.asarray(canvas.tokens[i, starts[i] : plan.first_column]) for i in range(len(rows))]
    number, count = 0, len(rows)
    while bool(unfinished):
        before, block = np.asarray(carry.tokens), int(carry.block)
        carry, candidates, probabilities, unfinished = _one_pass(decoder, plan, canvas, sampling, carry)
        after, number = np.asarray(carry.tokens), number + 1
        answer = np.s_[:count, plan.first_column :]
        watch(
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


@functools.partial(jax.jit, static_argnames="plan")
def _begin(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> tuple[Carry, Any]:
    loop, start = loop_over(decoder, plan, canvas, sampling)
    return start, loop.unfinished(start)


@functools.partial(jax.jit, static_argnames="plan")
def _one_pass(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling, carry: Carry):
    loop, _ = loop_over(decoder, plan, canvas, sampling)
    carry, proposal = loop.observed_step(carry)
    probabilities_BTV = jax.nn.softmax(proposal.logits, axis=-1)
    probabilities, candidates = jax.lax.top_k(probabilities_BTV, min(ALTERNATIVES, probabilities_BTV.shape[-1]))
    return carry, candidates, probabilities, loop.unfinished(carry)
