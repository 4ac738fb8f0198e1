"""The host side of sampling: rows of tokens with masks in them -> padded canvases -> the jitted sampler -> rows.

In a canvas the prompts of all rows end at the same column: they are padded on the left, answers on the right, so that
the blocks of all rows line up whatever their lengths. Few widths are used, so that few are compiled.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.distributed.mesh import row_shards
from difflm_jax.distributed.sharding import to_host
from difflm_jax.errors import UserError
from difflm_jax.models.transformer import Transformer
from difflm_jax.sampling.caches import Canvas, generate_on, row_sampling_keys
from difflm_jax.sampling.loop import Plan
from difflm_jax.sampling.options import Sampling
from difflm_jax.sampling.schedule import DEADLINE, quotas
from difflm_jax.sampling.watch import Watcher, generate_watched

SMALLEST_WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What decoding needs of a model; `variables` are its collections."""

    model: Transformer
    variables: dict[str, Any]
    diffusion: DiffusionConfig
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Filled:
    """Rows in their order: the tokens of the part that was filled, how many masks were, in how many passes."""

    rows: list[np.ndarray]
    committed: np.ndarray
    passes: np.ndarray


def width_bucket(length: int) -> int:
    """The number of columns for `length` tokens: 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, ..."""
    width = SMALLEST_WIDTH
    while width < length:
        power = 1 << (width.bit_length() - 1)
        width += max(SMALLEST_WIDTH, power // 4)
    return width


def answer_plan(
    diffusion: DiffusionConfig, max_new_tokens: int, steps: int, block_length: int | None, sampling: Sampling
) -> Plan:
    """The plan of an answer behind its prompt (`first_column` is set when the rows are known). Raises `UserError`."""
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("steps", steps)
    steps = _useful_steps(steps, max_new_tokens, sampling)
    if diffusion.decoding_block:
        trained, attention = diffusion.decoding_block, diffusion.attention
        if block_length not in (None, trained):
            raise UserError(f"block_length={block_length}: {attention} attention decodes in blocks of {trained}")
        if attention == "causal" and steps < max_new_tokens:
            raise UserError("generate: causal attention decodes one token a pass (steps >= max_new_tokens)")
        blocks = -(-max_new_tokens // trained)  # the last block is whole; the answer is cut
        given = trained - 1 if diffusion.blocks_include_prompt else 0  # of a prompt that ends within a block
        return Plan(0, -(-(max_new_tokens + given) // trained), trained, -(-steps // blocks))
    block_length = max_new_tokens if block_length is None else block_length
    check_positive("block_length", block_length)
    if max_new_tokens % block_length:
        raise UserError(f"max_new_tokens={max_new_tokens} must be a multiple of block_length={block_length}")
    blocks = max_new_tokens // block_length
    if sampling.schedule == DEADLINE and steps >= blocks:  # a limit, of which a few passes may be left over
        steps -= steps % blocks
    if steps % blocks:
        raise UserError(f"steps={steps} must be a multiple of the number of blocks ({blocks})")
    return Plan(0, blocks, block_length, steps // blocks)


def fill_answers(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    plan: Plan,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    watch: Watcher | None = None,
) -> Filled:
    """Answers of `max_new_tokens` to `prompts`, which hold at least one token each.

    The last block is whole. But under `block_causal` attention, where the prompt may end within a block, which the
    answer then completes, it is as long as what is left. `watch` is called after every pass.
    """
    diffusion = decoder.diffusion
    whole = max_new_tokens if diffusion.blocks_include_prompt else plan.num_blocks * plan.block_length
    answer = np.full(whole, diffusion.mask_token_id, np.int32)
    cuts = [diffusion.settled(len(prompt)) for prompt in prompts]
    rests = [np.concatenate([prompt[cut:], answer]) for prompt, cut in zip(prompts, cuts, strict=True)]
    prefixes = [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)]
    filled = _fill(decoder, prefixes, rests, plan, sampling, seed, batch_size, watch)
    answers = [
        row[len(prompt) - cut :][:max_new_tokens] for row, prompt, cut in zip(filled.rows, prompts, cuts, strict=True)
    ]
    return dataclasses.replace(filled, rows=answers)


def fill_masks(
    decoder: Decoder,
    rows: Sequence[np.ndarray],
    steps: int,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    watch: Watcher | None = None,
) -> Filled:
    """`rows` with their masks filled; what precedes the first mask of a row is its prompt. Raises `UserError`."""
    check_positive("steps", steps)
    diffusion = decoder.diffusion
    masks = [np.flatnonzero(row == diffusion.mask_token_id) for row in rows]
    if diffusion.shift and any(len(at) and at[0] == 0 for at in masks):
        raise UserError("infill: with the logit shift nothing predicts the first token: it must not be a mask")
    most = max((len(at) for at in masks), default=0)
    if most == 0:
        return Filled(list(rows), np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32))
    if diffusion.attention == "causal" and steps < most:
        raise UserError("infill: causal attention fills one mask a pass (steps >= number of masks)")
    cuts = [diffusion.settled(int(at[0]) if len(at) else len(row)) for row, at in zip(rows, masks, strict=True)]
    prompts = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    width = width_bucket(max(len(rest) for rest in rests))
    plans = [Plan(0, 1, width, _useful_steps(steps, most, sampling))] * len(rows)
    if diffusion.decoding_block:
        places = [at - cut for at, cut in zip(masks, cuts, strict=True)]
        plans = [_plan_in_blocks(diffusion.decoding_block, at, width, steps, sampling) for at in places]
    sampling = sampling.replace(stop_at_eos=False)  # an end of sequence ends an answer, but not a text with gaps
    whole: list[np.ndarray] = [np.empty(0)] * len(rows)
    committed, passes = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    for plan in dict.fromkeys(plans):
        numbers = [i for i, own in enumerate(plans) if own == plan]
        parts = [prompts[i] for i in numbers], [rests[i] for i in numbers]
        filled = _fill(decoder, *parts, plan, sampling, seed, batch_size, watch, numbers)
        committed[numbers], passes[numbers] = filled.committed, filled.passes
        for i, row in zip(numbers, filled.rows, strict=True):
            whole[i] = np.concatenate([prompts[i], row])
    return Filled(whole, committed, passes)


def _plan_in_blocks(block_length: int, places: np.ndarray, width: int, steps: int, sampling: Sampling) -> Plan:
    """The plan of a row of `width` columns with masks at `places`, whose blocks share the steps."""
    with_masks = len(set(places // block_length)) or 1
    of_a_block = _useful_steps(-(-steps // with_masks), block_length, sampling)
    return Plan(0, -(-width // block_length), block_length, of_a_block)


def check_positive(name: str, value: int) -> None:
    """Raises `UserError` unless `value` is an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value <= 0:
        raise UserError(f"{name} must be a positive integer, not {value!r}")


def check_seed(seed: int) -> None:
    """Raises `UserError` unless `seed` is an integer that is told apart from all others."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer in [0, 2^32), not {seed!r}")


def _useful_steps(steps: int, masks: int, sampling: Sampling) -> int:
    """With an even schedule a pass beyond one a mask would have nothing to commit."""
    return min(steps, masks) if sampling.schedule == "even" and not sampling.commits_by_rate else steps


def _fill(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    rests: Sequence[np.ndarray],
    plan: Plan,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    watch: Watcher | None,
    numbers: Sequence[int] | None = None,
) -> Filled:
    """Samples in batches of equal shape; the last one is filled up with copies of its first row.

    `numbers` are those by which `watch` is told of the rows (None: their places).
    """
    check_positive("batch_size", batch_size)
    check_seed(seed)
    if watch is not None and decoder.mesh is not None:
        raise UserError("watching: this model is divided over devices: load it on one for that")
    if not prompts:
        return Filled([], np.zeros(0, np.int32), np.zeros(0, np.int32))
    # The first window of block decoding reaches one block and one token back.
    longest = max(
        max(len(prompt) for prompt in prompts), plan.block_length + 1 if decoder.diffusion.decoding_block else 1
    )
    steps = np.int32(plan.steps_per_block)
    plan = dataclasses.replace(plan, first_column=width_bucket(longest), steps_per_block=most_steps(plan))
    rows = [np.concatenate(parts) for parts in zip(prompts, rests, strict=True)]
    numbers = range(len(rows)) if numbers is None else numbers
    keys = row_sampling_keys(seed, [tuple(row.tolist()) for row in rows])
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())
    if decoder.mesh is not None:
        batch_size += -batch_size % row_shards(decoder.mesh)
    filled: list[np.ndarray] = []
    committed: list[int] = []
    passes: list[int] = []
    for first in range(0, len(rows), batch_size):
        count = min(batch_size, len(rows) - first)
        index = np.concatenate([np.arange(first, first + count), np.full(batch_size - count, first)])
        tokens, valid = _padded([prompts[i] for i in index], [rests[i] for i in index], plan, decoder.pad_token_id)
        fillable = valid & (tokens == decoder.diffusion.mask_token_id)
        answers = fillable[:, plan.first_column :].reshape(len(index), plan.num_blocks, plan.block_length)
        schedule = quotas(sampling.schedule, answers.sum(axis=2), int(steps), plan.steps_per_block)
        canvas = Canvas(tokens, valid, fillable, prompt_lengths[index], schedule, keys[index])
        arguments = (
            decoder.model,
            decoder.variables,
            decoder.diffusion,
            plan,
            decoder.eos_token_ids,
            canvas,
            sampling,
            steps,
        )
        if watch is None:
            carry = generate_on(jax.default_backend())(*arguments, decoder.mesh)
        else:
            carry = generate_watched(*arguments, numbers[first : first + count], watch)
        tokens, used = to_host(carry.tokens), to_host(carry.passes)
        filled += [tokens[i, plan.first_column :][: len(rests[index[i]])] for i in range(count)]
        committed += (fillable & (tokens != decoder.diffusion.mask_token_id)).sum(axis=1)[:count].tolist()
        passes += used[:count].tolist()
    return Filled(filled, np.asarray(committed, np.int32), np.asarray(passes, np.int32))


def most_steps(plan: Plan) -> int:
    """The scheduled passes of a block that are compiled for: few different numbers, so that few are compiled."""
    return max(map(width_bucket, (plan.steps_per_block, plan.block_length))) if plan.steps_per_block > 1 else 1


def _padded(
    prompts: Sequence[np.ndarray], rests: Sequence[np.ndarray], plan: Plan, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, real) [B, L]: prompts end and rests begin at the first column of the plan."""
    columns = plan.first_column + plan.num_blocks * plan.block_length
    tokens = np.full((len(prompts), columns), pad, np.int32)
    valid = np.zeros((len(prompts), columns), bool)
    for i, (prompt, rest) in enumerate(zip(prompts, rests, strict=True)):
        at = slice(plan.first_column - len(prompt), plan.first_column + len(rest))
        tokens[i, at], valid[i, at] = np.concatenate([prompt, rest]), True
    return tokens, valid
