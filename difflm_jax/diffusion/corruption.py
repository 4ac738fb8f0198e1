"""From clean tokens to (noisy tokens, weights): which tokens are hidden, and the weight of each in the loss.

All noise is a function of (key of the step, example id), never of the device, the micro-batch or the padding. So the
same step on another mesh hides the same tokens.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.data.fields import FIELDS
from difflm_jax.diffusion.config import PROMPT_RULES, DiffusionConfig, Layout
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.weights import LossRule, after_eos, loss_weights
from difflm_jax.ops.random import token_seeds, uniform
from difflm_jax.utils.settings import RATE, setting

if TYPE_CHECKING:
    from difflm_jax.diffusion.lossless import Draft

# Streams folded into the key of a step, before the example id. `lossless` uses 6 to 8.
RATE_STREAM, MASK_STREAM, PREFIX_STREAM, DROPOUT_STREAM, POLICY_STREAM, OPENING_STREAM = range(6)

_GOLDEN_RATIO = 0.6180339887


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Which tokens are hidden and how they are scored. The defaults are the original system's pretraining rule.

    scope: "all" hides any real token (pretraining), "answer" only tokens of answers (SFT).
    mask_rate: "batch" draws one rate per step, uniform in [min_rate, max_rate]. "row" draws one per row, stratified
      over the step (arXiv:2107.00630, section I.1), so every step sees low and high rates. "block" draws one per block,
      stratified over rows and over the blocks of a row (BD3-LM, arXiv:2503.09573).
    loss: the weight of each token. extras: objectives whose gain was not shown.
    draft: the rules of the draft objective (`lossless`), which hides nothing; None: masked diffusion.
    diffusion: the config of the trained model. With attention "prefix" or "block" and scope "all", each example is cut
      at a random place, and the part before the cut is its clean prompt.
    """

    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    scope: str = "all"
    mask_rate: str = setting(
        "batch", "One mask rate per step, row (stratified) or block.", choices=("batch", "row", "block")
    )
    min_rate: float = setting(0.1, "Lowest mask rate.", within=RATE, key="min_mask_probability")
    max_rate: float = setting(0.95, "Highest mask rate.", within=RATE, key="max_mask_probability")
    loss: LossRule = dataclasses.field(default_factory=LossRule)
    extras: Extras = dataclasses.field(default_factory=Extras)
    draft: "Draft | None" = None

    def for_evaluation(self) -> "Corruption":
        """Returns the rule of evaluations: mask rates per row, and no extras (the reference is the only target)."""
        return dataclasses.replace(self, mask_rate="row", extras=Extras())


_Fields = dataclasses.make_dataclass("_Fields", [(name, jax.Array) for name in FIELDS], frozen=True)


@struct.dataclass
class CleanBatch(_Fields):
    """Rows of one or several examples, padded on the right: arrays [B, L] named as `difflm_jax.data.fields.FIELDS`."""

    row_lengths: jax.Array | None = None  # [B] int32, real tokens if each row is one example; None: packed rows
    clean: Any = None  # `lossless.CleanCopy` of the rows under the draft objective, if it was kept; rows first

    @classmethod
    def of_rows(cls, tokens, lengths, answer_mask, prompt_lengths, example_ids, strata) -> "CleanBatch":
        """Builds a batch with one example per row from arrays [..., L] (tokens, answer mask) and [...] (the others)."""
        position = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
        valid = position < lengths[..., None]

        of_examples = {
            "segments": jnp.ones_like(lengths),
            "lengths": lengths,
            "prompt_lengths": prompt_lengths,
            "example_ids": example_ids,
            "strata": strata,
        }
        at_tokens = {name: values[..., None] for name, values in of_examples.items()} | {"positions": position}
        fields = {
            name: jnp.where(valid, values, FIELDS[name].padding).astype(FIELDS[name].dtype)
            for name, values in at_tokens.items()
        }
        return cls(tokens=tokens, answer_mask=answer_mask, row_lengths=lengths, **fields)


@struct.dataclass
class NoisyBatch:
    """The input of the model and what it is scored on. `weights` is zero at positions that are not scored."""

    tokens: jax.Array  # [B, L] int32, with the mask id at hidden positions
    clean: jax.Array  # [B, L] int32, the same without masks
    segments: jax.Array  # [B, L] int32, as in `CleanBatch`
    positions: jax.Array  # [B, L] int32, as in `CleanBatch`
    prompt_lengths: jax.Array  # [B, L] int32, of the clean prompt of the token's example
    candidates: jax.Array  # [B, L] bool, tokens that could have been hidden
    masked: jax.Array  # [B, L] bool, tokens that are hidden
    rates: jax.Array  # [B, L] float32, mask rate with which each position was drawn
    weights: jax.Array  # [B, L] float32, of the cross-entropy with `clean`
    teacher_weights: jax.Array  # [B, L] float32, of the divergence from the teacher
    counts: jax.Array  # [B, L] float32, each position's part of the divisor of the loss
    dropout_seeds: jax.Array | None = None  # [B, L]; None: no dropout
    open: jax.Array | None = None  # [B, L, L] bool, `open_BTS` of the attention mask
    row_lengths: jax.Array | None = None  # [B] int32, as in `CleanBatch`

    @property
    def layout(self) -> Layout:
        return Layout(self.positions, self.segments != 0, self.prompt_lengths, self.segments)


def mask_rates(key: jax.Array, corruption: Corruption, strata_BL: jax.Array, block_BL: jax.Array) -> jax.Array:
    """Returns the mask rate [B, L] float32 of each position.

    strata_BL: place in [0, 1) of the token's example among those of the step. block_BL: number of the token's block.
    The rates of successive blocks are a golden ratio apart, so any few neighbours include low and high rates.
    """
    t_BL = jnp.broadcast_to(jax.random.uniform(jax.random.fold_in(key, RATE_STREAM)), block_BL.shape)
    if corruption.mask_rate != "batch":
        t_BL = t_BL + strata_BL
    if corruption.mask_rate == "block":
        t_BL = t_BL + block_BL * _GOLDEN_RATIO
    return corruption.min_rate + (corruption.max_rate - corruption.min_rate) * (t_BL % 1.0)


def corrupt(key: jax.Array, batch: CleanBatch, corruption: Corruption) -> NoisyBatch:
    """Hides tokens of `batch` according to `corruption`. `key` is the key of the step."""
    candidates, prompt_lengths = _candidates(key, batch, corruption)
    block_BL = (batch.positions - prompt_lengths) // jnp.maximum(corruption.diffusion.block_length, 1)
    rates = mask_rates(key, corruption, batch.strata, block_BL)
    seeds = token_seeds(jax.random.fold_in(key, MASK_STREAM), batch.example_ids, batch.positions)
    masked = candidates & (uniform(seeds) < rates)

    zeros = jnp.zeros_like(rates)
    everything = NoisyBatch(
        tokens=batch.tokens,
        clean=batch.tokens,
        segments=batch.segments,
        positions=batch.positions,
        prompt_lengths=prompt_lengths,
        candidates=candidates,
        masked=masked,
        rates=rates,
        weights=zeros,
        teacher_weights=zeros,
        counts=zeros,
        row_lengths=batch.row_lengths,
    )
    return hide(everything, masked, rates, corruption)


def hide(noisy: NoisyBatch, masked_BL: jax.Array, rates_BL: jax.Array, corruption: Corruption) -> NoisyBatch:
    """Returns `noisy` with the tokens `masked_BL` hidden instead, drawn at `rates_BL`; recomputes all weights."""
    weights_BL = loss_weights(noisy.replace(masked=masked_BL, rates=rates_BL), corruption.loss)
    # The base never saw answers padded with end-of-sequence tokens: after the first it cannot teach.
    taught_BL = masked_BL & ~after_eos(noisy.clean, noisy.candidates, noisy.segments, corruption.loss.eos_token_id)
    return noisy.replace(
        tokens=jnp.where(masked_BL, corruption.diffusion.mask_token_id, noisy.clean),
        masked=masked_BL,
        rates=rates_BL,
        weights=weights_BL,
        teacher_weights=jnp.where(taught_BL, corruption.extras.distillation * weights_BL, 0.0),
        counts=weights_BL,
    )


def _candidates(key: jax.Array, batch: CleanBatch, corruption: Corruption) -> tuple[jax.Array, jax.Array]:
    """Returns (positions that may be hidden, lengths of the clean prompts), both [B, L]."""
    valid = batch.segments != 0
    if corruption.scope == "answer":
        candidates, prompt_lengths = valid & batch.answer_mask, batch.prompt_lengths
    elif corruption.diffusion.attention in PROMPT_RULES:
        # One draw per example: every token uses the draw of the example's first token.
        first = jnp.zeros_like(batch.positions)
        draw = uniform(token_seeds(jax.random.fold_in(key, PREFIX_STREAM), batch.example_ids, first))
        prompt_lengths = (draw * batch.lengths).astype(jnp.int32)  # below the length: something is left to hide
        candidates = valid & (batch.positions >= prompt_lengths)
    else:
        candidates, prompt_lengths = valid, jnp.zeros_like(batch.lengths)
    return candidates & corruption.diffusion.predictable(batch.positions), prompt_lengths
