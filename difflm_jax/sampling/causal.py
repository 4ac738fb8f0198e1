"""The host side of causal decoding, plain or speculative: prompts -> padded batches -> the jitted loop -> rows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.errors import UserError
from difflm_jax.models.transformer import Transformer
from difflm_jax.sampling.batching import check_positive, check_seed, row_keys, width_bucket
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.columns import PREFILL_CHUNK, ColumnModel
from difflm_jax.sampling.drafts import Drafting
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
    on_batch: Callable[[list[np.ndarray]], None] | None = None,
) -> Continued:
    """Answers of at most `max_new_tokens` to `prompts` of at least one token, by `decoder`'s base and its adapter.

    `on_batch` is called with the rows of each batch. Rows do not depend on those that they share a batch with.
    """
    if decoder.mesh is not None:
        raise UserError("speculative decoding: this model is divided over devices: load it on one for that")
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("batch_size", batch_size)
    check_seed(seed)
    keys = row_keys(seed, prompts)
    batch_size = min(batch_size, 1 << (max(len(prompts), 1) - 1).bit_length())
    rows, counts = [], []
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
        carry = _continue(
            decoder.model,
            decoder.diffusion.mask_token_id,
            decoder.eos_token_ids,
            drafting,
            room,
            decoder.variables,
            tokens,
            lengths,
            limits.astype(np.int32),
            keys[index],
            sampling,
        )
        carry = jax.device_get(carry)
        batch = [carry.tokens[i, lengths[i] : carry.lengths[i]] for i in range(count)]
        if on_batch is not None:
            on_batch(batch)
        rows += batch
        counts.append((carry.passes[:count], carry.verified[:count], carry.accepted[:count]))
    if not rows:
        none = np.zeros(0, np.int32)
        return Continued([], none, none, np.zeros((0, drafting.deepest), np.int32))
    return Continued(rows, *(np.concatenate(parts) for parts in zip(*counts, strict=True)))


def prompt_width(length: int) -> int:
    """The columns that a prompt of `length` tokens is padded to."""
    width = width_bucket(length)
    return width if width <= PREFILL_CHUNK else width + -width % PREFILL_CHUNK


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _continue(
    model: Transformer,
    mask_token_id: int | None,
    eos_token_ids: tuple[int, ...],
    drafting: Drafting,
    room: int,
    variables: dict[str, Any],
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    limits_B: jax.Array,
    keys_B: jax.Array,
    sampling: Sampling,
) -> Carry:
    """The last carry; of its arrays those that belong to rows."""
    columns = ColumnModel(model, variables)
    loop = Loop(
        model=Predictor(columns.predict, columns.write),
        drafting=drafting,
        sampling=sampling,
        limits=limits_B,
        keys=keys_B,
        vocabulary=model.config.vocab_size,
        mask_token_id=mask_token_id,
        eos_token_ids=eos_token_ids,
    )
    tokens = jnp.pad(prompts_BP, ((0, 0), (0, room - prompts_BP.shape[1])))
    start = loop.start(tokens, lengths_B, columns.prefill(prompts_BP, room))
    return loop.run(start).replace(cache=None, drafts=None)
