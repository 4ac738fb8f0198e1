"""The host side of causal decoding, plain or speculative: prompts -> padded batches -> the jitted loop -> rows."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.errors import UserError
from difflm_jax.models.transformer import Transformer
from difflm_jax.sampling.batching import batches_shown, check_positive, check_seed, row_keys, width_bucket
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.columns import PREFILL_CHUNK, ColumnModel
from difflm_jax.sampling.constrained import Passes, run_within
from difflm_jax.sampling.constrained import Rows as GrammarRows
from difflm_jax.sampling.drafts import Drafting, Nodes
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.options import SPECULATIVE, Sampling
from difflm_jax.sampling.speculative import Carry, Loop, Predictor

DRAFT_LENGTH = 4  # where neither the options nor the adapter says
PLAIN = Drafting(strategy="plain", length=0, lookup=False)


@dataclasses.dataclass(frozen=True)
class Continued:
    """Rows in their order: the tokens of each answer, and what it took. R: rows; D: most drafts that a pass accepts."""

    rows: list[np.ndarray]
    passes: np.ndarray  # [R] forward passes
    verified: np.ndarray  # [R] passes that verified proposals
    accepted: np.ndarray  # [R, D] how many of those accepted at least 1, 2, ... of them


def drafting_of(
    diffusion: DiffusionConfig, sampling: Sampling, block_length: int | None = None, on_pass: Any = None
) -> Drafting:
    """How a model drafts under the options of speculative decoding. Raises `UserError`."""
    strategy = sampling.strategy or "one_pass"
    if not diffusion.gated and strategy != "lookup":
        raise UserError(
            f"algorithm={SPECULATIVE!r}: this model has no adapter that drafts (train one with objective=draft); "
            "strategy='lookup' needs none"
        )
    if block_length is not None:
        raise UserError(f"block_length={block_length}: speculative decoding has no blocks; draft_length is its width")
    if on_pass is not None:
        raise UserError("on_pass: speculative decoding cannot be watched; watch its base, whose text is the same")
    noise = diffusion.mask_token_id if diffusion.noise == "mask" else None
    length = sampling.draft_length or diffusion.draft_length or DRAFT_LENGTH
    return Drafting(strategy, length, sampling.lookup, noise)


def is_plain(decoder: Decoder, sampling: Sampling) -> bool:
    """Whether decoding is that of a causal base on one device, without options that look back at the whole text."""
    whole_text = (sampling.cfg_scale, sampling.repetition_penalty)
    is_base = decoder.diffusion.attention == "causal" and "lora" not in decoder.variables
    return is_base and decoder.mesh is None and whole_text == (None, None)


def continue_rows(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    drafting: Drafting = PLAIN,
    seed: int = 0,
    batch_size: int = 16,
    matchers: Sequence[Matcher] | None = None,
) -> Continued:
    """Answers of at most `max_new_tokens` to `prompts` of at least one token, by `decoder`'s base and its adapter.

    Rows do not depend on those that they share a batch with. `matchers`, one for each prompt, keep the answers to a
    grammar, and stand at their ends afterwards.
    """
    if decoder.mesh is not None:
        raise UserError("speculative decoding: this model is divided over devices: load it on one for that")
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("batch_size", batch_size)
    check_seed(seed)
    # As for the canvas of the diffusion loop, so that a watched generation draws the same tokens.
    masks = np.full(max_new_tokens, decoder.diffusion.mask_token_id, np.int32)
    keys = row_keys(seed, [np.concatenate([prompt, masks]) for prompt in prompts])
    batch_size = min(batch_size, 1 << (max(len(prompts), 1) - 1).bit_length())
    rows, counts = [], []
    with batches_shown(len(prompts), batch_size) as progress:
        for first in range(0, len(prompts), batch_size):
            count = min(batch_size, len(prompts) - first)
            index = np.concatenate([np.arange(first, first + count), np.full(batch_size - count, first)])
            lengths = np.array([len(prompts[i]) for i in index], np.int32)
            limits = lengths + max_new_tokens * (np.arange(batch_size) < count)  # copies end at once
            width = prompt_width(int(lengths.max()))
            tokens = np.full((batch_size, width), decoder.pad_token_id, np.int32)
            for place, i in enumerate(index):
                tokens[place, : lengths[place]] = prompts[i]
            room = width + width_bucket(max_new_tokens) + drafting.deepest + 1
            program = _Program(decoder.model, decoder.diffusion, decoder.eos_token_ids, drafting, room)
            batch = _Prompts(tokens, lengths, limits.astype(np.int32), keys[index])
            if matchers is None:
                carry = _continue(program, decoder.variables, batch, sampling)
            else:
                carry = _continue_within(program, decoder.variables, batch, sampling, matchers[first : first + count])
            carry = jax.device_get(carry)
            found = [carry.tokens[i, lengths[i] : carry.lengths[i]] for i in range(count)]
            rows += found
            counts.append((carry.passes[:count], carry.verified[:count], carry.accepted[:count]))
            progress.advance(count)
    if not rows:
        none = np.zeros(0, np.int32)
        return Continued([], none, none, np.zeros((0, drafting.deepest), np.int32))
    return Continued(rows, *(np.concatenate(parts) for parts in zip(*counts, strict=True)))


def prompt_width(length: int) -> int:
    """The columns that a prompt of `length` tokens is padded to."""
    width = width_bucket(length)
    return width if width <= PREFILL_CHUNK else width + -width % PREFILL_CHUNK


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is compiled for. `room`: columns of the cache."""

    model: Transformer
    diffusion: DiffusionConfig
    eos_token_ids: tuple[int, ...]
    drafting: Drafting
    room: int


@struct.dataclass
class _Prompts:
    """A batch, padded on the right. `limits`: the most tokens of a row, prompt included."""

    tokens: jax.Array  # [B, P] int32
    lengths: jax.Array  # [B] int32
    limits: jax.Array  # [B] int32
    keys: jax.Array  # [B]


@functools.partial(jax.jit, static_argnums=0)
def _continue(program: _Program, variables: dict[str, Any], prompts: _Prompts, sampling: Sampling) -> Carry:
    """The last carry; of its arrays those that belong to rows."""
    return _loop(program, variables, prompts, sampling).run(_begin(program, variables, prompts, sampling)).slim()


def _continue_within(
    program: _Program, variables: dict[str, Any], prompts: _Prompts, sampling: Sampling, matchers: Sequence[Matcher]
) -> Carry:
    """`_continue` under a grammar: the same passes, one by one."""
    known = (program, variables, prompts, sampling)
    passes = Passes(
        draft=functools.partial(_draft, *known) if program.drafting.drafts_first else None,
        nodes=functools.partial(_nodes, *known),
        verify=functools.partial(_verify, *known),
    )
    vocabulary = program.model.config.vocab_size
    rows = GrammarRows(matchers, np.asarray(prompts.limits), vocabulary, program.eos_token_ids)
    return run_within(passes, rows, _begin(*known)).slim()


@functools.partial(jax.jit, static_argnums=0)
def _begin(program: _Program, variables: dict[str, Any], prompts: _Prompts, sampling: Sampling) -> Carry:
    columns = ColumnModel(program.model, variables)
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, program.room - prompts.tokens.shape[1])))
    cache = columns.prefill(prompts.tokens, program.room)
    return _loop(program, variables, prompts, sampling).start(tokens, prompts.lengths, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _draft(program, variables, prompts, sampling, carry: Carry, allowed_B1W: jax.Array) -> Carry:
    return _loop(program, variables, prompts, sampling).draft(carry, allowed_B1W)


@functools.partial(jax.jit, static_argnums=0)
def _nodes(program, variables, prompts, sampling, carry: Carry) -> Nodes:
    return _loop(program, variables, prompts, sampling).nodes(carry)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _verify(program, variables, prompts, sampling, carry: Carry, allowed_BNW: jax.Array) -> Carry:
    return _loop(program, variables, prompts, sampling).verify(carry, allowed_BNW)


def _loop(program: _Program, variables: dict[str, Any], prompts: _Prompts, sampling: Sampling) -> Loop:
    columns = ColumnModel(program.model, variables)
    return Loop(
        model=Predictor(columns.predict, columns.write),
        drafting=program.drafting,
        sampling=sampling,
        limits=prompts.limits,
        keys=prompts.keys,
        vocabulary=program.model.config.vocab_size,
        mask_token_id=program.diffusion.mask_token_id,
        eos_token_ids=program.eos_token_ids,
    )
