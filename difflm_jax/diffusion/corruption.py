"""From clean tokens to (noisy tokens, weights): which tokens are hidden, and what each counts in the loss.

All noise is a function of (key of the step, example id), never of the device, the micro-batch or the padding, so that
the same step on another mesh hides the same tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.noise import token_seeds, uniform

# Streams folded into the key of a step; the example id is folded in after them.
_RATE_STREAM, _MASK_STREAM, _PREFIX_STREAM = range(3)

_GOLDEN_RATIO = 0.6180339887


@dataclasses.dataclass(frozen=True)
class Corruption:
    """What is hidden and what is scored. The defaults are the original system's pretraining rule.

    scope: "all" hides any real token (pretraining), "answer" only tokens of answers (SFT).
    mask_rate: "batch" draws one rate a step, uniform in [min_rate, max_rate]; "row" one a row, stratified over the step
      (arXiv:2107.00630, section I.1), so that every step sees low and high rates; "block" one a block, stratified over
      rows and over the blocks of a row (BD3-LM, arXiv:2503.09573).
    loss_tokens: "all" scores every token that could have been hidden, "masked" only those that were.
    loss_weight: "uniform", or "inverse_rate" for the 1/t weight of the diffusion bound (MDLM, arXiv:2406.07524;
      LLaDA, arXiv:2502.09992).
    attention, logit_shift, block_length: the attention rule, shift and blocks of the model that is trained. Under
      "prefix" and "block" a row without a prompt of its own (scope "all") is cut at a random place, and what precedes
      the cut is its clean prompt.
    """

    scope: str = "all"
    mask_rate: str = "batch"
    min_rate: float = 0.1
    max_rate: float = 0.95
    loss_tokens: str = "all"
    loss_weight: str = "uniform"
    attention: str = "full"
    logit_shift: bool = False
    block_length: int = 0


@struct.dataclass
class CleanBatch:
    """Rows of one or several examples, padded on the right. What concerns an example stands at each of its tokens."""

    tokens: jax.Array  # [B, L] int32
    answer_mask: jax.Array  # [B, L] bool
    segments: jax.Array  # [B, L] int32, number of the example in its row from 1; 0 at padding
    positions: jax.Array  # [B, L] int32, place of the token in its example
    lengths: jax.Array  # [B, L] int32, tokens of the example
    prompt_lengths: jax.Array  # [B, L] int32, index of the example's first answer token, or its length if it has none
    example_ids: jax.Array  # [B, L] int32, index in the data set; -1 at padding
    strata: jax.Array  # [B, L] float32 in [0, 1), place of the example among all of the step

    @classmethod
    def of_rows(cls, tokens, lengths, answer_mask, prompt_lengths, example_ids, strata) -> "CleanBatch":
        """A batch with one example a row, of arrays [..., L] (tokens, answer mask) and [...] (the others)."""
        position = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
        valid = position < lengths[..., None]

        def at_tokens(values: jax.Array, padding: int = 0) -> jax.Array:
            return jnp.where(valid, values[..., None], padding)

        return cls(
            tokens=tokens,
            answer_mask=answer_mask,
            segments=valid.astype(jnp.int32),
            positions=jnp.where(valid, position, 0),
            lengths=at_tokens(lengths),
            prompt_lengths=at_tokens(prompt_lengths),
            example_ids=at_tokens(example_ids, -1),
            strata=at_tokens(strata.astype(jnp.float32)),
        )


@struct.dataclass
class NoisyBatch:
    """What the model sees and what it is scored on. `weights` is zero where a position is not scored."""

    tokens: jax.Array  # [B, L] int32 with mask ids in it
    masked: jax.Array  # [B, L] bool
    weights: jax.Array  # [B, L] float32
    rates: jax.Array  # [B, L] float32, the mask rate that each position was drawn with
    prompt_lengths: jax.Array  # [B, L] int32, of the clean prompt of the token's example


def mask_rates(key: jax.Array, corruption: Corruption, strata_BL: jax.Array, block_BL: jax.Array) -> jax.Array:
    """[B, L] float32 mask rates of examples at places `strata_BL` (in [0, 1)) among those of a step.

    `block_BL` numbers the block of each position. The rates of successive blocks are a golden ratio apart: of any few
    neighbours some are low and some are high.
    """
    t_BL = jnp.broadcast_to(jax.random.uniform(jax.random.fold_in(key, _RATE_STREAM)), block_BL.shape)
    if corruption.mask_rate != "batch":
        t_BL = t_BL + strata_BL
    if corruption.mask_rate == "block":
        t_BL = t_BL + block_BL * _GOLDEN_RATIO
    return corruption.min_rate + (corruption.max_rate - corruption.min_rate) * (t_BL % 1.0)


def corrupt(key: jax.Array, batch: CleanBatch, corruption: Corruption, mask_token_id: int) -> NoisyBatch:
    """Hides tokens of `batch` by the rule `corruption`; `key` is that of the step."""
    candidates, prompt_lengths = _candidates(key, batch, corruption)
    block_BL = (batch.positions - prompt_lengths) // max(corruption.block_length, 1)
    rates = mask_rates(key, corruption, batch.strata, block_BL)
    seeds = token_seeds(jax.random.fold_in(key, _MASK_STREAM), batch.example_ids, batch.positions)
    masked = candidates & (uniform(seeds) < rates)

    scored = candidates if corruption.loss_tokens == "all" else masked
    weight = 1.0 / rates if corruption.loss_weight == "inverse_rate" else jnp.ones_like(rates)
    return NoisyBatch(
        tokens=jnp.where(masked, mask_token_id, batch.tokens),
        masked=masked,
        weights=scored * weight,
        rates=rates,
        prompt_lengths=prompt_lengths,
    )


def _candidates(key: jax.Array, batch: CleanBatch, corruption: Corruption) -> tuple[jax.Array, jax.Array]:
    """(positions that may be hidden, lengths of the clean prompts), both [B, L]."""
    valid = batch.segments > 0
    if corruption.scope == "answer":
        candidates, prompt_lengths = valid & batch.answer_mask, batch.prompt_lengths
    elif corruption.attention in ("prefix", "block"):
        # One draw an example: that of its first token, at each of its tokens.
        first = jnp.zeros_like(batch.positions)
        draw = uniform(token_seeds(jax.random.fold_in(key, _PREFIX_STREAM), batch.example_ids, first))
        prompt_lengths = (draw * batch.lengths).astype(jnp.int32)  # below the length: something is left to hide
        candidates = valid & (batch.positions >= prompt_lengths)
    else:
        candidates, prompt_lengths = valid, jnp.zeros_like(batch.lengths)
    if corruption.logit_shift:
        candidates = candidates & (batch.positions > 0)  # nothing precedes the first token, so nothing predicts it
    return candidates, prompt_lengths
