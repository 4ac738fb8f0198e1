"""From clean tokens to (noisy tokens, weights): which tokens are hidden, and what each counts in the loss.

All noise is a function of (key of the step, example id), never of the device, the micro-batch or the padding, so that
the same step on another mesh hides the same tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

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
    """Rows as the pipeline makes them, padded on the right: see `difflm_jax.data.pipeline.batches`."""

    tokens: jax.Array  # [B, L] int32
    lengths: jax.Array  # [B] int32, 0 for a filler row
    answer_mask: jax.Array  # [B, L] bool
    prompt_lengths: jax.Array  # [B] int32
    example_ids: jax.Array  # [B] int32
    row_index: jax.Array  # [B] int32, place of the row among all rows of the step


@struct.dataclass
class NoisyBatch:
    """What the model sees and what it is scored on. `weights` is zero where a position is not scored."""

    tokens: jax.Array  # [B, L] int32 with mask ids in it
    valid: jax.Array  # [B, L] bool
    masked: jax.Array  # [B, L] bool
    weights: jax.Array  # [B, L] float32
    rates: jax.Array  # [B, L] float32, the mask rate that each position was drawn with
    prompt_lengths: jax.Array  # [B] int32


def mask_rates(
    key: jax.Array, corruption: Corruption, row_index_B: jax.Array, num_rows: int, block_BL: jax.Array
) -> jax.Array:
    """[B, L] float32 mask rates of rows at places `row_index_B` among the `num_rows` of a step.

    `block_BL` numbers the block of each position. The rates of successive blocks are a golden ratio apart: of any few
    neighbours some are low and some are high.
    """
    u = jax.random.uniform(jax.random.fold_in(key, _RATE_STREAM))
    t_BL = jnp.broadcast_to(u, block_BL.shape)
    if corruption.mask_rate != "batch":
        t_BL = t_BL + row_index_B[:, None] / num_rows
    if corruption.mask_rate == "block":
        t_BL = t_BL + block_BL * _GOLDEN_RATIO
    return corruption.min_rate + (corruption.max_rate - corruption.min_rate) * (t_BL % 1.0)


def row_keys(key: jax.Array, example_ids_B: jax.Array) -> jax.Array:
    """One key a row, from the key of the step and the example's id."""
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(example_ids_B)


def corrupt(key: jax.Array, batch: CleanBatch, corruption: Corruption, mask_token_id: int, num_rows: int) -> NoisyBatch:
    """Hides tokens of `batch` by the rule `corruption`; `num_rows` is the number of rows of the whole step."""
    length = batch.tokens.shape[1]
    position_L = jnp.arange(length)
    valid = position_L < batch.lengths[:, None]
    candidates, prompt_lengths = _candidates(key, batch, corruption, valid)

    block_BL = (position_L - prompt_lengths[:, None]) // max(corruption.block_length, 1)
    rates = mask_rates(key, corruption, batch.row_index, num_rows, block_BL)
    keys = row_keys(jax.random.fold_in(key, _MASK_STREAM), batch.example_ids)
    draws = jax.vmap(lambda row_key: jax.random.uniform(row_key, (length,)))(keys)
    masked = candidates & (draws < rates)

    scored = candidates if corruption.loss_tokens == "all" else masked
    weight = 1.0 / rates if corruption.loss_weight == "inverse_rate" else jnp.ones_like(rates)
    return NoisyBatch(
        tokens=jnp.where(masked, mask_token_id, batch.tokens),
        valid=valid,
        masked=masked,
        weights=scored * weight,
        rates=rates,
        prompt_lengths=prompt_lengths,
    )


def _candidates(
    key: jax.Array, batch: CleanBatch, corruption: Corruption, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(positions that may be hidden [B, L], lengths of the clean prompts [B])."""
    position_L = jnp.arange(valid.shape[1])
    if corruption.scope == "answer":
        candidates, prompt_lengths = valid & batch.answer_mask, batch.prompt_lengths
    elif corruption.attention in ("prefix", "block"):
        keys = row_keys(jax.random.fold_in(key, _PREFIX_STREAM), batch.example_ids)
        cut = jax.vmap(jax.random.uniform)(keys) * batch.lengths
        prompt_lengths = cut.astype(jnp.int32)  # below the length: something is always left to hide
        candidates = valid & (position_L >= prompt_lengths[:, None])
    else:
        candidates, prompt_lengths = valid, jnp.zeros_like(batch.lengths)
    if corruption.logit_shift:
        candidates = candidates & (position_L > 0)  # nothing precedes the first token, so nothing predicts it
    return candidates, prompt_lengths
