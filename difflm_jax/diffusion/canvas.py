"""The host side of sampling: rows of tokens with masks in them -> padded canvases -> the jitted sampler -> rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from difflm_jax.diffusion.confidence import CONFIDENCES
from difflm_jax.diffusion.denoiser import generate, row_sampling_keys
from difflm_jax.diffusion.sampler import Plan
from difflm_jax.errors import UserError
from difflm_jax.mesh import row_shards, to_host
from difflm_jax.models.transformer import Transformer

COLUMN_MULTIPLE = 32  # canvases are padded to it, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What decoding needs of a model; `variables` are its collections."""

    model: Transformer
    variables: dict[str, Any]
    logit_shift: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    mesh: Mesh | None = None


def answer_plan(
    attention: str, max_new_tokens: int, steps: int, block_length: int | None, temperature: float, algorithm: str
) -> Plan:
    """The plan of an answer behind its prompt (`first_column` is set by `fill_answers`). Raises `UserError`."""
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("steps", steps)
    check_sampling(temperature, algorithm)
    steps = min(steps, max_new_tokens)  # a pass beyond one a token would have nothing to commit
    if attention == "causal":
        if steps < max_new_tokens or block_length not in (None, 1):
            raise UserError("generate: causal attention decodes one token a pass (steps >= max_new_tokens)")
        block_length = 1
    block_length = max_new_tokens if block_length is None else block_length
    check_positive("block_length", block_length)
    if max_new_tokens % block_length:
        raise UserError(f"max_new_tokens={max_new_tokens} must be a multiple of block_length={block_length}")
    blocks = max_new_tokens // block_length
    if steps % blocks:
        raise UserError(f"steps={steps} must be a multiple of the number of blocks ({blocks})")
    return Plan(0, blocks, block_length, steps // blocks, float(temperature), algorithm)


def fill_answers(
    decoder: Decoder, prompts: Sequence[np.ndarray], plan: Plan, seed: int, batch_size: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """([max_new_tokens] tokens of each answer, passes [rows]). Prompts are padded on the left: answers line up."""
    length = plan.num_blocks * plan.block_length
    width = _round_up(max((len(row) for row in prompts), default=1))
    answer = np.full(length, decoder.model.mask_token_id, np.int32)
    rows = [np.concatenate([row, answer]) for row in prompts]
    plan = dataclasses.replace(plan, first_column=width)
    filled, passes = _fill(
        decoder, rows, [len(row) for row in prompts], plan, seed, batch_size, width + length, left=True
    )
    return [row[-length:] for row in filled], passes


def fill_masks(
    decoder: Decoder,
    rows: Sequence[np.ndarray],
    steps: int,
    temperature: float,
    algorithm: str,
    seed: int,
    batch_size: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """(rows with their masks filled, passes [rows]); what precedes the first mask of a row is its prompt."""
    check_positive("steps", steps)
    check_sampling(temperature, algorithm)
    masks = [np.flatnonzero(row == decoder.model.mask_token_id) for row in rows]
    if decoder.logit_shift and any(len(at) and at[0] == 0 for at in masks):
        raise UserError("infill: with the logit shift nothing predicts the first token: it must not be a mask")
    most = max((len(at) for at in masks), default=0)
    if most == 0:
        return list(rows), np.zeros(len(rows), np.int32)
    width = _round_up(max(len(row) for row in rows))
    plan = Plan(0, 1, width, min(steps, most), float(temperature), algorithm, stop_at_eos=False)
    prompt_lengths = [int(at[0]) if len(at) else len(row) for row, at in zip(rows, masks, strict=True)]
    return _fill(decoder, rows, prompt_lengths, plan, seed, batch_size, width, left=False)


def check_positive(name: str, value: int) -> None:
    """Raises `UserError` unless `value` is an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value <= 0:
        raise UserError(f"{name} must be a positive integer, not {value!r}")


def check_sampling(temperature: float, algorithm: str) -> None:
    """Raises `UserError` for a negative temperature or an unknown algorithm."""
    if not temperature >= 0:
        raise UserError(f"temperature must be at least 0, not {temperature!r}")
    if algorithm not in CONFIDENCES:
        raise UserError(f"algorithm={algorithm!r} is not one of {', '.join(CONFIDENCES)}")


def _fill(
    decoder: Decoder,
    rows: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    plan: Plan,
    seed: int,
    batch_size: int,
    width: int,
    left: bool,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Samples in batches of [batch_size, width]; the last one is filled up with copies of its first row."""
    check_positive("batch_size", batch_size)
    if not rows:
        return [], np.zeros(0, np.int32)
    keys = row_sampling_keys(seed, [tuple(row.tolist()) for row in rows])
    batch_size = min(batch_size, len(rows))
    if decoder.mesh is not None:
        batch_size += -batch_size % row_shards(decoder.mesh)
    filled: list[np.ndarray] = []
    passes: list[int] = []
    for first in range(0, len(rows), batch_size):
        count = min(batch_size, len(rows) - first)
        index = np.concatenate([np.arange(first, first + count), np.full(batch_size - count, first)])
        tokens, valid = _pad([rows[i] for i in index], width, decoder.pad_token_id, left)
        carry = generate(
            decoder.model,
            decoder.variables,
            decoder.logit_shift,
            plan,
            decoder.eos_token_ids,
            tokens,
            valid,
            valid & (tokens == decoder.model.mask_token_id),
            np.asarray(prompt_lengths, np.int32)[index],
            keys[index],
            decoder.mesh,
        )
        tokens, used = to_host(carry.tokens), to_host(carry.passes)
        filled += [tokens[i][valid[i]] for i in range(count)]
        passes += used[:count].tolist()
    return filled, np.asarray(passes, np.int32)


def _pad(rows: Sequence[np.ndarray], width: int, pad: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), width), pad, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, at], valid[i, at] = row, True
    return tokens, valid


def _round_up(length: int) -> int:
    return -(-length // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
