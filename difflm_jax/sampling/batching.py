"""The host side of sampling: rows of tokens with masks -> padded canvases -> the jitted sampler -> rows.

In a canvas the prompts of all rows end at the same column: prompts are padded on the left, answers on the right. So
the blocks of all rows line up, whatever their lengths. Widths are rounded up to a few values to limit compilations.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.distributed.mesh import row_shards
from difflm_jax.distributed.sharding import to_host
from difflm_jax.errors import UserError
from difflm_jax.sampling.caches import Decoder, fill_on
from difflm_jax.sampling.loop import Canvas, Plan
from difflm_jax.sampling.options import SPECULATIVE, Sampling
from difflm_jax.sampling.places import fill_in_turn
from difflm_jax.sampling.schedule import quotas, shares
from difflm_jax.sampling.watch import Host, fill_stepwise
from difflm_jax.utils.progress import Progress

SMALLEST_WIDTH = 16


@dataclasses.dataclass(frozen=True)
class FillOptions:
    """How rows are filled: sampling options, at most `steps` passes per row, and host callbacks (`watch.Host`)."""

    sampling: Sampling
    steps: int = 128
    seed: int = 0
    batch_size: int = 16
    host: Host | None = None


@dataclasses.dataclass(frozen=True)
class Filled:
    """Rows in input order: the tokens of the filled part, the number of masks filled, and the passes used."""

    rows: list[np.ndarray]
    committed: np.ndarray
    passes: np.ndarray


def width_bucket(length: int) -> int:
    """Rounds `length` up to a number of columns: 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, ..."""
    width = SMALLEST_WIDTH
    while width < length:
        power = 1 << (width.bit_length() - 1)
        width += max(SMALLEST_WIDTH, power // 4)
    return width


def answer_plan(
    diffusion: DiffusionConfig, max_new_tokens: int, steps: int, block_length: int | None, sampling: Sampling
) -> Plan:
    """Plans the blocks of an answer (`first_column` is set once the rows are known). Raises `UserError`.

    `steps` is an upper bound over all blocks together, and each block takes at least one pass.
    """
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("steps", steps)
    own, attention = diffusion.decoding_block, diffusion.attention
    if own and block_length not in (None, own):
        raise UserError(f"block_length={block_length}: {attention} attention decodes in blocks of {own}")
    if attention == "causal" and steps < max_new_tokens:
        raise UserError("generate: causal attention decodes one token a pass (steps >= max_new_tokens)")
    block_length = own or (max_new_tokens if block_length is None else block_length)
    check_positive("block_length", block_length)
    if not own and max_new_tokens % block_length:
        raise UserError(f"max_new_tokens={max_new_tokens} must be a multiple of block_length={block_length}")
    blocks = diffusion.fewest_passes(max_new_tokens, block_length)  # the last block is full; the answer is cut
    if steps < blocks:
        raise UserError(
            f"steps={steps}: max_new_tokens={max_new_tokens} are {blocks} blocks of {block_length}, and each takes at "
            f"least one pass: raise steps to {blocks} or more"
        )
    masks_BJ = np.full((1, blocks), block_length)
    most = int(shares(steps, masks_BJ, sampling.at_most_one_pass_per_mask).max())
    given = block_length - 1 if diffusion.blocks_include_prompt else 0  # most prompt tokens in the first block
    return Plan(0, -(-(max_new_tokens + given) // block_length), block_length, most)


def fill_answers(
    decoder: Decoder, prompts: Sequence[np.ndarray], max_new_tokens: int, plan: Plan, options: FillOptions
) -> Filled:
    """Generates answers of `max_new_tokens` to `prompts` of at least one token each.

    The last block is full. Under `block_causal` attention a prompt may end within a block, which the answer completes.
    The last block then has only the remaining tokens.
    """
    diffusion = decoder.diffusion
    whole = max_new_tokens if diffusion.blocks_include_prompt else plan.num_blocks * plan.block_length
    answer = np.full(whole, diffusion.mask_token_id, np.int32)
    cuts = [diffusion.settled(len(prompt)) for prompt in prompts]
    rests = [np.concatenate([prompt[cut:], answer]) for prompt, cut in zip(prompts, cuts, strict=True)]
    prefixes = [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)]
    filled = _fill(decoder, prefixes, rests, plan, options)
    answers = [
        row[len(prompt) - cut :][:max_new_tokens] for row, prompt, cut in zip(filled.rows, prompts, cuts, strict=True)
    ]
    return dataclasses.replace(filled, rows=answers)


def fill_masks(decoder: Decoder, rows: Sequence[np.ndarray], options: FillOptions) -> Filled:
    """Fills the masks in `rows`. The tokens before a row's first mask are its prompt. Raises `UserError`."""
    check_positive("steps", options.steps)
    if options.sampling.algorithm == SPECULATIVE:
        raise UserError("infill: the causal base verifies what follows a text; it fills no gaps")
    diffusion = decoder.diffusion
    masks = [np.flatnonzero(row == diffusion.mask_token_id) for row in rows]
    if diffusion.shift and any(len(at) and at[0] == 0 for at in masks):
        raise UserError("infill: with the logit shift nothing predicts the first token: it must not be a mask")
    most = max((len(at) for at in masks), default=0)
    if most == 0:
        return Filled(list(rows), np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32))
    if diffusion.attention == "causal" and options.steps < most:
        raise UserError("infill: causal attention fills one mask a pass (steps >= number of masks)")
    cuts = [diffusion.settled(int(at[0]) if len(at) else len(row)) for row, at in zip(rows, masks, strict=True)]
    prompts = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    width = width_bucket(max(len(rest) for rest in rests))
    block_length = diffusion.decoding_block or width
    plan = Plan(0, -(-width // block_length), block_length, options.steps)
    # An end of sequence ends an answer, but not a text with gaps.
    options = dataclasses.replace(options, sampling=options.sampling.replace(stop_at_eos=False))
    filled = _fill(decoder, prompts, rests, plan, options)
    whole = [np.concatenate(parts) for parts in zip(prompts, filled.rows, strict=True)]
    return dataclasses.replace(filled, rows=whole)


def check_positive(name: str, value: int) -> None:
    """Raises `UserError` unless `value` is an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value <= 0:
        raise UserError(f"{name} must be a positive integer, not {value!r}")


def check_seed(seed: int) -> None:
    """Raises `UserError` unless `seed` is an integer in [0, 2^32), where all seeds are distinct."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer in [0, 2^32), not {seed!r}")


def _fill(
    decoder: Decoder, prompts: Sequence[np.ndarray], rests: Sequence[np.ndarray], plan: Plan, options: FillOptions
) -> Filled:
    """Samples in batches of equal shape (`rows_of_batch`), padded with copies of their first row.

    More rows than `batch_size` use `fill_in_turn`, unless there is a host or a mesh.
    """
    sampling, batch_size, host = options.sampling, options.batch_size, options.host
    check_positive("batch_size", batch_size)
    check_seed(options.seed)
    if host is not None and decoder.mesh is not None:
        raise UserError("watching, and grammars: this model is divided over devices: load it on one for that")
    if not prompts:
        return Filled([], np.zeros(0, np.int32), np.zeros(0, np.int32))
    masks_BJ = np.stack([masks_of_blocks(rest == decoder.diffusion.mask_token_id, plan) for rest in rests])
    steps_BJ = steps_of_blocks(masks_BJ, plan, options)
    # The first window of block decoding reaches one block and one token back.
    shortest = plan.block_length + 1 if decoder.diffusion.decoding_block else 1
    first_column = width_bucket(max(shortest, *map(len, prompts)))
    plan = dataclasses.replace(plan, first_column=first_column, steps_per_block=steps_bucket(steps_BJ.max(), plan))
    rows = [np.concatenate(parts) for parts in zip(prompts, rests, strict=True)]
    keys = row_keys(options.seed, rows)
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    batch_size = rows_of_batch(len(prompts), batch_size)
    if decoder.mesh is not None:  # rows are divided over the devices
        batch_size += -batch_size % row_shards(decoder.mesh)

    def canvas_of(index: np.ndarray) -> Canvas:
        tokens, valid = _padded([prompts[i] for i in index], [rests[i] for i in index], plan, decoder.pad_token_id)
        fillable = valid & (tokens == decoder.diffusion.mask_token_id)
        schedule = quotas(sampling.schedule, masks_BJ[index], steps_BJ[index], plan.steps_per_block)
        return Canvas(tokens, valid, fillable, prompt_lengths[index], steps_BJ[index], schedule, keys[index])

    filled, passes = [None] * len(rows), np.zeros(len(rows), np.int32)
    with batches_shown(len(rows), batch_size if host is None else len(rows)) as progress:
        if len(rows) > batch_size and host is None and decoder.mesh is None:
            found = fill_in_turn(decoder, plan, sampling, canvas_of, len(rows), batch_size)
        else:
            found = _in_batches(decoder, plan, options, canvas_of, len(rows), batch_size)
        for row, tokens, used in found:
            filled[row], passes[row] = tokens[plan.first_column :][: len(rests[row])], used
            progress.advance(1)
    committed = masks_BJ.sum(axis=1) - [(row == decoder.diffusion.mask_token_id).sum() for row in filled]
    return Filled(filled, committed.astype(np.int32), passes)


def _in_batches(
    decoder: Decoder,
    plan: Plan,
    options: FillOptions,
    canvas_of: Callable[[np.ndarray], Canvas],
    count: int,
    batch_size: int,
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields (row, its tokens [L], its passes), batch by batch."""
    for first in range(0, count, batch_size):
        rows = range(first, min(first + batch_size, count))
        canvas = canvas_of(np.concatenate([rows, np.full(batch_size - len(rows), first)]).astype(int))
        if options.host is None:
            carry = fill_on(jax.default_backend())(decoder, plan, canvas, options.sampling)
        else:
            carry = fill_stepwise(decoder, plan, canvas, options.sampling, rows, options.host)
        yield from zip(rows, to_host(carry.tokens), to_host(carry.passes).tolist(), strict=False)


def rows_of_batch(count: int, batch_size: int) -> int:
    """Returns the rows that `count` prompts are computed in: the next power of two, at most `batch_size`.

    A single prompt would else take the time and memory of `batch_size` rows.
    """
    return min(batch_size, 1 << (max(count, 1) - 1).bit_length())


def batches_shown(rows: int, batch_size: int) -> Progress:
    """Returns a progress bar over rows that are answered batch by batch. One batch shows none."""
    return Progress("answering", "rows", rows if rows > batch_size else 0)


def steps_bucket(most: int, plan: Plan) -> int:
    """Rounds the scheduled passes of a block up to a few values, to limit compilations."""
    return max(map(width_bucket, (int(most), plan.block_length))) if most > 1 else 1


def row_keys(seed: int, rows: Sequence[np.ndarray]) -> jax.Array:
    """[B] one key per row: a function of `seed`, the row's tokens, and the number of earlier copies of the row.

    A row draws the same noise alone and in any batch. Different rows, and copies of a row, draw independently.
    """
    words, seen = np.zeros((len(rows), 3), np.uint32), Counter()
    for number, row in enumerate(rows):
        digest = hashlib.blake2b(np.asarray(row, "<i4").tobytes(), digest_size=8).digest()
        words[number] = *np.frombuffer(digest, "<u4"), seen[digest]
        seen[digest] += 1
    return _keys_of(jax.random.key(seed), words)


@functools.partial(jax.vmap, in_axes=(None, 0))
def _keys_of(key: jax.Array, words: jax.Array) -> jax.Array:
    """Folds each of a row's three `words` into `key`."""
    return functools.reduce(jax.random.fold_in, (words[0], words[1], words[2]), key)


def masks_of_blocks(is_mask_L: np.ndarray, plan: Plan) -> np.ndarray:
    """[J] number of masks in each block of a row; `is_mask_L` begins with the first block."""
    return np.bincount(np.flatnonzero(is_mask_L) // plan.block_length, minlength=plan.num_blocks)


def steps_of_blocks(masks_BJ: np.ndarray, plan: Plan, options: FillOptions) -> np.ndarray:
    """[B, J] passes of each block. Raises `UserError` if a row has more blocks with masks than passes."""
    blocks_B = (masks_BJ > 0).sum(axis=1)
    row = int(blocks_B.argmax())
    if blocks_B[row] > options.steps:
        raise UserError(
            f"steps={options.steps}: row {row + 1} has masks in {blocks_B[row]} blocks of {plan.block_length}, and "
            f"each takes at least one pass: raise steps to {blocks_B[row]} or more"
        )
    return shares(options.steps, masks_BJ, options.sampling.at_most_one_pass_per_mask)


def _padded(
    prompts: Sequence[np.ndarray], rests: Sequence[np.ndarray], plan: Plan, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens int32, valid bool) [B, L]: prompts end and rests begin at the plan's first column."""
    columns = plan.first_column + plan.num_blocks * plan.block_length
    tokens = np.full((len(prompts), columns), pad, np.int32)
    valid = np.zeros((len(prompts), columns), bool)
    for i, (prompt, rest) in enumerate(zip(prompts, rests, strict=True)):
        at = slice(plan.first_column - len(prompt), plan.first_column + len(rest))
        tokens[i, at], valid[i, at] = np.concatenate([prompt, rest]), True
    return tokens, valid
