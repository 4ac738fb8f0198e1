"""Sampling with someone who watches: the passes of the sampler's own loop, made one by one, and what each of them did.

The host steps the body of the loop that `denoiser.fill` runs on the device, so that the answers are the same
(on a GPU, where products are then other kernels, up to their rounding); what is not watched costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.sampling.caches import Canvas, Variables, loop_of
from difflm_jax.sampling.loop import Carry, Plan
from difflm_jax.sampling.options import Sampling

ALTERNATIVES = 5


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward pass has done to the rows of a batch. T: columns behind the prompts; K: likeliest tokens kept.

    Of a canvas that was infilled the columns begin at its first mask.
    """

    rows: Sequence[int]  # places of the rows among all that were given
    number: int  # from 1, in this batch
    prompts: list[np.ndarray]  # tokens of each row before column 0
    tokens: np.ndarray  # [rows, T] int32 after the pass; mask ids where nothing is committed
    real: np.ndarray  # [rows, T] bool, False where a row has ended
    confidence: np.ndarray  # [rows, T] float32, probability of each token when it was committed, 0 elsewhere
    written: np.ndarray  # [rows, T] bool, committed or replaced in this pass
    block: slice  # the columns that were active
    candidates: np.ndarray  # [rows, block, K] int32, the likeliest tokens in the active block, before the pass
    probabilities: np.ndarray  # [rows, block, K] float32


Watcher = Callable[[Pass], None]


def generate_watched(
    model: Transformer,
    variables: Variables,
    diffusion: DiffusionConfig,
    plan: Plan,
    eos_token_ids: tuple[int, ...],
    canvas: Canvas,
    sampling: Sampling,
    steps: jax.Array | None,
    rows: Sequence[int],
    watch: Watcher,
) -> Carry:
    """`denoiser.fill` on one device, calling `watch` after every pass.

    The first rows of `canvas` are those at places `rows` of all; what follows is filler.
    """
    static = (model, diffusion, plan, eos_token_ids)
    moving = (variables, canvas, sampling, steps)
    carry, unfinished = _begin(*static, *moving)
    real_BT = canvas.valid[:, plan.first_column :]
    starts = [plan.first_column - int(length) for length in canvas.prompt_lengths]
    prompts = [np.asarray(canvas.tokens[i, starts[i] : plan.first_column]) for i in range(len(rows))]
    number, count = 0, len(rows)
    while bool(unfinished):
        before, block = np.asarray(carry.tokens), int(carry.block)
        carry, candidates, probabilities, unfinished = _one_pass(*static, *moving, carry)
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
                written=(after != before)[answer] & (after != diffusion.mask_token_id)[answer],
                block=slice(block * plan.block_length, (block + 1) * plan.block_length),
                candidates=np.asarray(candidates)[:count],
                probabilities=np.asarray(probabilities)[:count],
            )
        )
    return carry


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _begin(model, diffusion, plan, eos_token_ids, variables, canvas, sampling, steps) -> tuple[Carry, Any]:
    loop, start = loop_of(model, variables, diffusion, plan, eos_token_ids, canvas, sampling, steps)
    return start, loop.unfinished(start)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _one_pass(model, diffusion, plan, eos_token_ids, variables, canvas, sampling, steps, carry: Carry):
    loop, _ = loop_of(model, variables, diffusion, plan, eos_token_ids, canvas, sampling, steps)
    carry, proposal = loop.seen_step(carry)
    probabilities_BTV = jax.nn.softmax(proposal.logits, axis=-1)
    probabilities, candidates = jax.lax.top_k(probabilities_BTV, min(ALTERNATIVES, probabilities_BTV.shape[-1]))
    return carry, candidates, probabilities, loop.unfinished(carry)
