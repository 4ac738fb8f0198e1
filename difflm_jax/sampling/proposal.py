"""From the logits of a pass to its proposal: penalties and filters, the drawn tokens, their scores."""

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.sampling.confidence import CONFIDENCES, log_odds
from difflm_jax.sampling.options import Sampling

# Streams folded into the key of (row, block, step).
TOKEN_STREAM, SCORE_STREAM, RANK_STREAM, REMASK_STREAM = range(4)


@struct.dataclass
class Proposal:
    """The tokens that one forward pass proposes for the active block, and their scores."""

    tokens: jax.Array  # [B, T] int32
    score: jax.Array  # [B, T] float32, ranks the positions
    probability: jax.Array  # [B, T] float32, probability of the token under `logits`
    logits: jax.Array  # [B, T, V] float32, of the distribution that tokens are drawn from
    noisy: jax.Array  # [B, T, V] float32, `logits` plus the noise of the draw: `tokens` are its argmax


def propose(
    logits_BTV: jax.Array,
    seen_BV: jax.Array | None,
    keys_B: jax.Array,
    sampling: Sampling,
    mask_token_id: int,
    eos_token_ids: tuple[int, ...],
) -> Proposal:
    """Draws a token for every position and scores it. `repetition_penalty` applies to the tokens in `seen_BV`.

    The mask token is never drawn and has probability 0.
    """
    token_V = jnp.arange(logits_BTV.shape[-1])  # selects, not scatters: selects fuse with the consumers of the logits
    logits_BTV = jnp.where(token_V == mask_token_id, -jnp.inf, logits_BTV)
    if sampling.repetition_penalty is not None:
        logits_BTV = penalise_repetition(logits_BTV, seen_BV, sampling.repetition_penalty)
    eos = jnp.array(eos_token_ids, jnp.int32)
    if sampling.eos_penalty is not None:
        logits_BTV = jnp.where(jnp.isin(token_V, eos), logits_BTV - sampling.eos_penalty, logits_BTV)
    drawn_BTV = drawn_from(logits_BTV, sampling)
    noisy_BTV = with_noise(drawn_BTV, keys_B if sampling.temperature is not None else None)
    tokens_BT = noisy_BTV.argmax(axis=-1).astype(jnp.int32)

    confidence = CONFIDENCES[sampling.algorithm]
    noise_BT = noise(jax.random.uniform, keys_B, SCORE_STREAM, tokens_BT.shape[1:])
    score_BT = confidence.score(drawn_BTV if confidence.of_drawn else logits_BTV, tokens_BT, noise_BT)
    if sampling.alg_temp is not None:  # the k largest of these are k draws without replacement
        gumbel_BT = noise(jax.random.gumbel, keys_B, RANK_STREAM, tokens_BT.shape[1:], mode="high")
        score_BT = confidence.value(score_BT) / sampling.alg_temp + gumbel_BT
    if sampling.eos_last:
        score_BT = jnp.where(jnp.isin(tokens_BT, eos), -jnp.inf, score_BT)
    probability_BT = jax.nn.sigmoid(log_odds(drawn_BTV, tokens_BT, noise_BT))
    return Proposal(tokens_BT, score_BT, probability_BT, drawn_BTV, noisy_BTV)


def drawn_from(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that tokens are drawn from: temperature, then top-p, then top-k, in Dream's order."""
    if sampling.temperature is not None:
        logits_BTV = logits_BTV / sampling.temperature
    if sampling.top_p is not None:
        # A token stays if those before it in order of probability add up to at most top_p.
        order_BTV = jnp.argsort(-logits_BTV, axis=-1, stable=True)
        sorted_BTV = jax.nn.softmax(jnp.take_along_axis(logits_BTV, order_BTV, axis=-1), axis=-1)
        dropped_BTV = jnp.cumsum(sorted_BTV, axis=-1) - sorted_BTV > sampling.top_p
        dropped_BTV = jnp.take_along_axis(dropped_BTV, jnp.argsort(order_BTV, axis=-1), axis=-1)
        logits_BTV = jnp.where(dropped_BTV, -jnp.inf, logits_BTV)
    if sampling.top_k is not None:
        best_BTk, _ = jax.lax.top_k(logits_BTV, min(sampling.top_k, logits_BTV.shape[-1]))
        logits_BTV = jnp.where(logits_BTV < best_BTk[..., -1:], -jnp.inf, logits_BTV)
    return logits_BTV


def draw(logits_BTV: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """[B, T] int32: a draw from softmax(logits); without keys, the most likely token."""
    return with_noise(logits_BTV, keys_B).argmax(axis=-1).astype(jnp.int32)


def with_noise(logits_BTV: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """[B, T, V] logits plus Gumbel noise, whose argmax is a draw from softmax(logits); without keys, the logits.

    The noise is float32 with `mode="high"`, which keeps its upper tail. A truncated tail would act as a lower
    temperature.
    """
    if keys_B is None:
        return logits_BTV
    return logits_BTV + noise(jax.random.gumbel, keys_B, TOKEN_STREAM, logits_BTV.shape[1:], mode="high")


def penalise_repetition(logits_BTV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divides positive logits of seen tokens by `penalty` and multiplies negative ones (CTRL, arXiv:1909.05858)."""
    penalised_BTV = jnp.where(logits_BTV > 0, logits_BTV / penalty, logits_BTV * penalty)
    return jnp.where(seen_BV[:, None], penalised_BTV, logits_BTV)


def seen_tokens(tokens_BL: jax.Array, real_BL: jax.Array, vocabulary: int) -> jax.Array:
    """[B, V] bool: the tokens that occur in each row at places where `real_BL` is true."""
    rows_B1 = jnp.arange(tokens_BL.shape[0])[:, None]
    return jnp.zeros((tokens_BL.shape[0], vocabulary), bool).at[rows_B1, tokens_BL].max(real_BL)


def noise(sampler, keys_B: jax.Array, stream: int, shape: tuple[int, ...], **options) -> jax.Array:
    """[B, *shape] noise from `sampler` under each row's own key; `stream` is folded in."""
    return jax.vmap(lambda key: sampler(jax.random.fold_in(key, stream), shape, **options))(keys_B)
