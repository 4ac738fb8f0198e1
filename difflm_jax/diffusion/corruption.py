"""From clean tokens to (noisy tokens, weights): which tokens are hidden, and what each counts in the loss.

All noise is a function of (key of the step, example id), never of the device, the micro-batch or the padding, so that
the same step on another mesh hides the same tokens.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.data.fields import FIELDS
from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.diffusion.weights import behind_eos, loss_weights
from difflm_jax.ops.random import token_seeds, uniform
from difflm_jax.utils.settings import NOT_NEGATIVE, POSITIVE, RATE, SHARE, setting

if TYPE_CHECKING:
    from difflm_jax.diffusion.lossless import Draft

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
    loss_weight, loss_average, eos_loss, eos_token_id: see `difflm_jax.diffusion.weights.loss_weights`.
    complementary: each row is used twice, with its mask and with the complement (`extras.complementary`).
    on_policy, on_policy_passes, on_policy_tokens: share of examples that are trained on states of the model's own
      decoding (`difflm_jax.diffusion.extras.on_policy`).
    distillation: weight of the divergence from the causal base (`difflm_jax.diffusion.extras.distillation`).
    draft: the rules of the draft objective (`lossless`), under which nothing is hidden; None: masked diffusion.
    anneal_steps, anneal_power, block_growth_steps: a gentle start, off at 0 steps (`extras.annealing`).
    diffusion: the model that is trained. Under attention "prefix" and "block" a row without a prompt of its own (scope
      "all") is cut at a random place, and what precedes the cut is its clean prompt.
    """

    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    scope: str = "all"
    mask_rate: str = setting(
        "batch", "One mask rate per step, row (stratified) or block.", choices=("batch", "row", "block")
    )
    min_rate: float = setting(0.1, "Lowest mask rate.", within=RATE, key="min_mask_probability")
    max_rate: float = setting(0.95, "Highest mask rate.", within=RATE, key="max_mask_probability")
    loss_tokens: str = setting(
        "all", "Tokens that are scored: all that could have been hidden, or those that were.", choices=("all", "masked")
    )
    loss_weight: str = setting(
        "uniform", "inverse_rate: by 1 / mask rate (MDLM, LLaDA); context: by visible neighbours (CART).",
        choices=("uniform", "inverse_rate", "context"),
    )  # fmt: skip
    loss_average: str = setting(
        "tokens", "answers: every answer counts the same (LLaDA's SFT).", choices=("tokens", "answers")
    )
    eos_loss: str = setting("all", "first: EOS tokens that fill an answer up are not scored.", choices=("all", "first"))
    eos_token_id: int = -1
    complementary: bool = setting(
        False, "Each row is used twice, with its mask and with the complement.", key="complementary_masks"
    )
    on_policy: float = setting(0.0, "Share of rows in states of the model's own decoding.", within=SHARE)
    on_policy_passes: int = setting(1, "Forward passes of that decoding.", within=POSITIVE)
    on_policy_tokens: str = setting(
        "reference", "own: the model's own tokens there, which only a teacher judges.", choices=("reference", "own")
    )
    distillation: float = setting(
        0.0,
        "Weight of the KL divergence from the causal base; one more forward pass.",
        within=NOT_NEGATIVE,
        key="distillation_weight",
    )
    anneal_steps: int = setting(
        0, "Steps in which edges to later tokens open at random; 0: open from the start.", within=NOT_NEGATIVE
    )
    anneal_power: float = setting(1.0, "Above 1: slowly first.", within=POSITIVE)
    block_growth_steps: int = setting(
        0, "Steps in which blocks grow from 1 to block_length; 0: they do not.", within=NOT_NEGATIVE
    )

    draft: "Draft | None" = None

    def for_evaluation(self) -> "Corruption":
        """What evaluations hide and score: random masks at rates over all examples, against the reference alone."""
        plain = {
            "complementary": False,
            "on_policy": 0.0,
            "distillation": 0.0,
            "anneal_steps": 0,
            "block_growth_steps": 0,
        }
        return dataclasses.replace(self, mask_rate="row", **plain)


_Fields = dataclasses.make_dataclass("_Fields", [(name, jax.Array) for name in FIELDS], frozen=True)


@struct.dataclass
class CleanBatch(_Fields):
    """Rows of one or several examples, padded on the right: arrays [B, L] named as `difflm_jax.data.fields.FIELDS`."""

    row_lengths: jax.Array | None = None  # [B] int32, real tokens of rows that hold one example; None: of several

    @classmethod
    def of_rows(cls, tokens, lengths, answer_mask, prompt_lengths, example_ids, strata) -> "CleanBatch":
        """A batch with one example a row, of arrays [..., L] (tokens, answer mask) and [...] (the others)."""
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
    """What the model sees and what it is scored on. `weights` is zero where a position is not scored."""

    tokens: jax.Array  # [B, L] int32 with mask ids in it
    clean: jax.Array  # [B, L] int32, the same without masks
    segments: jax.Array  # [B, L] int32, as in `CleanBatch`
    positions: jax.Array  # [B, L] int32, as in `CleanBatch`
    prompt_lengths: jax.Array  # [B, L] int32, of the clean prompt of the token's example
    candidates: jax.Array  # [B, L] bool, what could have been hidden
    masked: jax.Array  # [B, L] bool
    rates: jax.Array  # [B, L] float32, the mask rate that each position was drawn with
    weights: jax.Array  # [B, L] float32, of the cross-entropy with `clean`
    teacher_weights: jax.Array  # [B, L] float32, of the divergence from the teacher
    counts: jax.Array  # [B, L] float32, what each position adds to the divisor of the loss
    open: jax.Array | None = None  # [B, L, L] bool, `open_BTS` of the attention mask
    row_lengths: jax.Array | None = None  # [B] int32, as in `CleanBatch`

    @property
    def layout(self) -> Layout:
        return Layout(self.positions, self.segments != 0, self.prompt_lengths, self.segments)


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


def corrupt(key: jax.Array, batch: CleanBatch, corruption: Corruption) -> NoisyBatch:
    """Hides tokens of `batch` by the rule `corruption`; `key` is that of the step."""
    candidates, prompt_lengths = _candidates(key, batch, corruption)
    block_BL = (batch.positions - prompt_lengths) // jnp.maximum(corruption.diffusion.block_length, 1)
    rates = mask_rates(key, corruption, batch.strata, block_BL)
    seeds = token_seeds(jax.random.fold_in(key, _MASK_STREAM), batch.example_ids, batch.positions)
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
    """The same rows with another choice of hidden tokens, drawn at `rates_BL`."""
    weights_BL = loss_weights(
        masked_BL,
        noisy.candidates,
        noisy.segments,
        noisy.positions,
        rates_BL,
        noisy.clean,
        tokens=corruption.loss_tokens,
        weight=corruption.loss_weight,
        average=corruption.loss_average,
        eos=corruption.eos_loss,
        eos_token_id=corruption.eos_token_id,
    )
    # The base never saw an answer filled up with end-of-sequence tokens: behind the first it has nothing to teach.
    taught_BL = masked_BL & ~behind_eos(noisy.clean, noisy.candidates, noisy.segments, corruption.eos_token_id)
    return noisy.replace(
        tokens=jnp.where(masked_BL, corruption.diffusion.mask_token_id, noisy.clean),
        masked=masked_BL,
        rates=rates_BL,
        weights=weights_BL,
        teacher_weights=jnp.where(taught_BL, corruption.distillation * weights_BL, 0.0),
        counts=weights_BL,
    )


def _candidates(key: jax.Array, batch: CleanBatch, corruption: Corruption) -> tuple[jax.Array, jax.Array]:
    """(positions that may be hidden, lengths of the clean prompts), both [B, L]."""
    valid = batch.segments != 0
    if corruption.scope == "answer":
        candidates, prompt_lengths = valid & batch.answer_mask, batch.prompt_lengths
    elif corruption.diffusion.attention in ("prefix", "block"):
        # One draw an example: that of its first token, at each of its tokens.
        first = jnp.zeros_like(batch.positions)
        draw = uniform(token_seeds(jax.random.fold_in(key, _PREFIX_STREAM), batch.example_ids, first))
        prompt_lengths = (draw * batch.lengths).astype(jnp.int32)  # below the length: something is left to hide
        candidates = valid & (batch.positions >= prompt_lengths)
    else:
        candidates, prompt_lengths = valid, jnp.zeros_like(batch.lengths)
    return candidates & corruption.diffusion.predictable(batch.positions), prompt_lengths
