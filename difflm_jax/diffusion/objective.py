"""The loss of a corrupted batch, as sums: what is divided, and by what, is for the caller who sees all devices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.diffusion.corruption import CleanBatch, Corruption, NoisyBatch, corrupt
from difflm_jax.diffusion.cross_entropy import scored_cross_entropy
from difflm_jax.models.attention import block_starts
from difflm_jax.models.transformer import Transformer, head_weight
from difflm_jax.noise import fold_seeds, token_seeds

RATE_BUCKETS = 5  # mask rates are reported in [0, 0.2), [0.2, 0.4), ... [0.8, 1]
_DROPOUT_STREAM = 3  # the streams below it are those of `corruption`


@struct.dataclass
class LossSums:
    """Sums over the positions of a batch; adding two of them gives those of both batches. All float32."""

    loss: jax.Array  # [] sum of weight * cross-entropy
    weight: jax.Array  # [] sum of weights
    masked_nll: jax.Array  # [RATE_BUCKETS] nats, over hidden tokens by the mask rate that they were drawn with
    masked_correct: jax.Array  # [RATE_BUCKETS]
    masked_count: jax.Array  # [RATE_BUCKETS]
    tokens: jax.Array  # [] real tokens


def predicting_states(hidden_BLD: jax.Array, logit_shift: bool) -> jax.Array:
    """Aligns hidden states with the tokens that they predict: with the shift, state i - 1 predicts token i."""
    return jnp.roll(hidden_BLD, 1, axis=1) if logit_shift else hidden_BLD


def loss_sums(
    model: Transformer,
    params: dict[str, Any],
    lora: dict[str, Any],
    batch: CleanBatch,
    key: jax.Array,
    corruption: Corruption,
    chunk: int,
    train: bool,
) -> tuple[jax.Array, LossSums]:
    """(sum of weight * cross-entropy, all sums); the first is differentiable with respect to `lora`.

    `key` is that of the step; `train` turns dropout on.
    """
    noisy = corrupt(key, batch, corruption, model.mask_token_id)
    seeds_BL = None
    if train:
        seeds_BL = token_seeds(jax.random.fold_in(key, _DROPOUT_STREAM), batch.example_ids, batch.positions)
    variables = {"params": params, "lora": lora}
    hidden_BLD = predicting_states_of(model, variables, noisy, batch, seeds_BL, corruption.logit_shift)
    loss, nll_M, correct_M = scored_cross_entropy(
        hidden_BLD.reshape(-1, hidden_BLD.shape[-1]),
        head_weight(model.config, params),
        batch.tokens.reshape(-1),
        noisy.weights.reshape(-1),
        model.mask_token_id,
        chunk,
        model.config.vocab_size,
    )
    bucket_BL = jnp.minimum((noisy.rates * RATE_BUCKETS).astype(jnp.int32), RATE_BUCKETS - 1)

    def by_rate(values_BL: jax.Array) -> jax.Array:
        hidden = (noisy.masked * values_BL).reshape(-1)
        return jax.ops.segment_sum(hidden, bucket_BL.reshape(-1), num_segments=RATE_BUCKETS)

    return loss, LossSums(
        loss=jax.lax.stop_gradient(loss),
        weight=noisy.weights.sum(),
        masked_nll=by_rate(nll_M.reshape(noisy.tokens.shape)),
        masked_correct=by_rate(correct_M.reshape(noisy.tokens.shape)),
        masked_count=by_rate(jnp.ones(noisy.tokens.shape)),
        tokens=(batch.segments > 0).sum().astype(jnp.float32),
    )


def predicting_states_of(
    model, variables, noisy: NoisyBatch, batch: CleanBatch, seeds_BL, logit_shift: bool
) -> jax.Array:
    """[B, L, D] the states that predict each token of a corrupted batch; `batch` is the clean one."""
    states = _block_states if model.attention == "block" else _states
    return states(model, variables, noisy, batch, seeds_BL, logit_shift)


def _states(model, variables, noisy: NoisyBatch, batch: CleanBatch, seeds_BL, logit_shift: bool) -> jax.Array:
    """[B, L, D] the states that predict each token."""
    hidden_BLD = model.apply(
        variables,
        noisy.tokens,
        batch.positions,
        batch.segments > 0,
        noisy.prompt_lengths,
        seeds_BL,
        segments_BT=batch.segments,
    )
    return predicting_states(hidden_BLD, logit_shift)


def _block_states(model, variables, noisy: NoisyBatch, batch: CleanBatch, seeds_BL, logit_shift: bool) -> jax.Array:
    """The same under `block` attention: a noisy and a clean copy of each row run together (BD3-LM, arXiv:2503.09573).

    A noisy block sees the clean blocks before it, as it does when text is generated. With the shift the first token of
    a block is predicted from the block before it, which is finished by then: from its clean copy.
    """
    length = batch.tokens.shape[1]

    def twice(x_BL: jax.Array) -> jax.Array:
        return jnp.concatenate([x_BL, x_BL], axis=1)

    hidden_BLD = model.apply(
        variables,
        jnp.concatenate([noisy.tokens, batch.tokens], axis=1),
        twice(batch.positions),
        twice(batch.segments > 0),
        twice(noisy.prompt_lengths),
        None if seeds_BL is None else jnp.concatenate([seeds_BL, fold_seeds(seeds_BL, 0)], axis=1),
        noisy_T=jnp.arange(2 * length) < length,
        segments_BT=twice(batch.segments),
    )
    noisy_BLD, clean_BLD = jnp.split(hidden_BLD, 2, axis=1)
    if not logit_shift:
        return noisy_BLD
    opens_BL = block_starts(batch.positions, noisy.prompt_lengths, model.block_length) == batch.positions
    shifted = (predicting_states(clean_BLD, True), predicting_states(noisy_BLD, True))
    return jnp.where(opens_BL[..., None], *shifted)
