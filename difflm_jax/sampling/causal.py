"""The host side of causal decoding, plain or speculative: prompts -> padded batches -> the jitted loop -> rows."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.distributed.mesh import row_shards
from difflm_jax.distributed.sharding import to_host
from difflm_jax.errors import UserError
from difflm_jax.sampling.batching import (
    FillOptions,
    batches_shown,
    check_positive,
    check_seed,
    row_keys,
    rows_of_batch,
    width_bucket,
)
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.columns import PREFILL_CHUNK
from difflm_jax.sampling.cycles import Batch, Observer, Task, decode, decode_within
from difflm_jax.sampling.drafts import Drafting
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.options import SPECULATIVE, Sampling
from difflm_jax.sampling.verified import diffusion_drafting

DRAFT_LENGTH = 4  # default, if neither the options nor the adapter sets it
LOOKED_UP = 8  # looked-up tokens that are verified in addition to drafts
PLAIN = Drafting(strategy="plain", length=0, lookup=False)


@dataclasses.dataclass(frozen=True)
class Continued:
    """Answers in input order, and their passes. R: rows; D: most drafts that a pass accepts."""

    rows: list[np.ndarray]
    passes: np.ndarray  # [R] forward passes
    verified: np.ndarray  # [R] passes that verified proposals
    accepted: np.ndarray  # [R, D] passes that accepted at least 1, 2, ... proposals


def drafting_of(diffusion: DiffusionConfig, sampling: Sampling, block_length: int | None = None) -> Drafting:
    """Returns how a model drafts under the options of speculative decoding. Raises `UserError`."""
    if block_length is not None:
        raise UserError(f"block_length={block_length}: speculative decoding has no blocks; draft_length is its width")
    if sampling.verify is not None:
        return diffusion_drafting(diffusion, sampling)
    strategy = sampling.strategy or "one_pass"
    if not diffusion.gated and strategy != "lookup":
        raise UserError(
            f"algorithm={SPECULATIVE!r}: this model has no adapter that drafts (train one with objective=draft); "
            "strategy='lookup' needs none"
        )
    noise = diffusion.mask_token_id if diffusion.noise == "mask" else None
    own = LOOKED_UP if strategy == "lookup" else diffusion.draft_length or DRAFT_LENGTH
    length = sampling.draft_length or own
    # With drafts that are drawn there is no second branch: rejection sampling follows a chain.
    is_beside = sampling.lookup and sampling.temperature is None and strategy in ("one_pass", "likeliest")
    return Drafting(strategy, length, sampling.lookup, noise, beside=LOOKED_UP if is_beside else 0)


def is_plain(decoder: Decoder, sampling: Sampling) -> bool:
    """Whether the decoder is a causal base and no option depends on the whole text."""
    whole_text = (sampling.cfg_scale, sampling.repetition_penalty)
    is_base = decoder.diffusion.attention == "causal" and "lora" not in decoder.variables
    return is_base and whole_text == (None, None)


def continue_rows(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    options: FillOptions,
    drafting: Drafting = PLAIN,
    ended: Callable[[np.ndarray], bool] | None = None,
    drafter: Decoder | None = None,
    matchers: Sequence[Matcher] | None = None,
) -> Continued:
    """Continues `prompts` of at least one token by at most `max_new_tokens`, with `decoder`'s base and its adapter.

    Rows do not depend on the others in their batch. `options.steps` has no effect. Raises `UserError`.

    ended: maps the tokens of an unfinished answer to whether it may stop there.
    drafter: drafts by diffusion, instead of an adapter of `decoder` (`verified`).
    matchers: one per prompt, to constrain its answer to a grammar. Each is advanced to the end of its answer.
    """
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("batch_size", options.batch_size)
    check_seed(options.seed)
    watch = options.host and options.host.watch
    on_host = "watching" if watch is not None else "grammar" if matchers is not None else ""
    if on_host and decoder.mesh is not None:
        raise UserError(f"{on_host}: this model is divided over devices: load it on one for that")
    if matchers is not None and (watch is not None or drafter is not None):
        raise UserError("grammar: speculative decoding under one is not watched, nor verified by another model")
    # As for the canvas of the diffusion loop, so that a watched generation draws the same tokens.
    masks = np.full(max_new_tokens, decoder.diffusion.mask_token_id, np.int32)
    keys = row_keys(options.seed, [np.concatenate([prompt, masks]) for prompt in prompts])
    batch_size = rows_of_batch(len(prompts), options.batch_size)
    if decoder.mesh is not None:  # rows are divided over the devices
        batch_size += -batch_size % row_shards(decoder.mesh)
    observer = Observer(watch, ended)
    rows, counts = [], []
    with batches_shown(len(prompts), batch_size if watch is None else len(prompts)) as progress:
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
            task = Task(decoder, options.sampling, drafting, room, drafter)
            batch = Batch(tokens, lengths, limits.astype(np.int32), keys[index])
            if matchers is None:
                carry = decode(task, batch, observer, range(first, first + count))
            else:
                carry = decode_within(task, batch, matchers[first : first + count])
            carry = jax.tree.map(to_host, carry)
            rows += [carry.tokens[i, lengths[i] : carry.lengths[i]] for i in range(count)]
            counts.append((carry.passes[:count], carry.verified[:count], carry.accepted[:count]))
            progress.advance(count)
    if not rows:
        none = np.zeros(0, np.int32)
        return Continued([], none, none, np.zeros((0, drafting.deepest), np.int32))
    return Continued(rows, *(np.concatenate(parts) for parts in zip(*counts, strict=True)))


def prompt_width(length: int) -> int:
    """Number of columns that a prompt of `length` tokens is padded to."""
    width = width_bucket(length)
    return width if width <= PREFILL_CHUNK else width + -width % PREFILL_CHUNK
