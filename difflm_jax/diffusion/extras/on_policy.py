"""Training on states of the model's own decoding: the hidden tokens are those that it would not yet have committed.

Random masks hide any token. A sampler leaves the least confident tokens, and a model that commits several tokens per
pass sees only those. So here all candidates are hidden first. The model commits the most confident ones in a few passes
without gradient, until the drawn mask rate is reached. It is trained on the rest.
"""

import jax
import jax.numpy as jnp

from difflm_jax.diffusion.corruption import POLICY_STREAM, Corruption, NoisyBatch, hide
from difflm_jax.diffusion.extras.step import OwnScores, Step
from difflm_jax.diffusion.weights import in_group
from difflm_jax.ops.random import uniform


def on_policy(noisy: NoisyBatch, step: Step) -> NoisyBatch:
    """Applies `on_policy_states` if they are on."""
    if not step.corruption.extras.on_policy:
        return noisy
    draws_BL = uniform(step.example_seeds(POLICY_STREAM))
    return on_policy_states(draws_BL, noisy, _groups(noisy, step.corruption), step.own_scores, step.corruption)


def on_policy_states(
    draws_BL: jax.Array,
    noisy: NoisyBatch,
    group_BL: jax.Array,
    own_scores: OwnScores,
    corruption: Corruption,
) -> NoisyBatch:
    """Returns `noisy` with a share `on_policy` of its examples in decoding states, after `on_policy_passes` passes.

    These are the examples whose `draws_BL` (uniform in [0, 1), one per example) are below the share. Within each group
    of equal `group_BL` (a block, an answer), the most probable tokens are committed first. With `on_policy_tokens`
    "reference" the clean tokens are committed, with "own" the model's choices (OPDLM). An example whose committed
    choices differ from its reference has no target any more: only the teacher scores it, on the model's completion.
    """
    masked_BL, own_BL, choice_BL = noisy.candidates, noisy.clean, noisy.clean
    count_BL = in_group(group_BL, noisy.candidates)
    target_BL = jnp.maximum(jnp.round(noisy.rates * count_BL), 1)
    for index in range(corruption.extras.on_policy_passes):
        state = hide(noisy.replace(clean=own_BL), masked_BL, noisy.rates, corruption)
        _, scores = own_scores(state, masked_BL.astype(jnp.float32))
        share = (index + 1) / corruption.extras.on_policy_passes
        left_BL = jnp.round(count_BL - (count_BL - target_BL) * share)
        still_BL = least_confident(scores.confidence, masked_BL, group_BL, left_BL)
        choice_BL = jnp.where(masked_BL, scores.choice, choice_BL)
        if corruption.extras.on_policy_tokens == "own":
            own_BL = jnp.where(masked_BL & ~still_BL, scores.choice, own_BL)
        masked_BL = still_BL

    is_chosen_BL = draws_BL < corruption.extras.on_policy
    state = hide(noisy, jnp.where(is_chosen_BL, masked_BL, noisy.masked), noisy.rates, corruption)
    if corruption.extras.on_policy_tokens == "reference":
        return state
    strays_BL = in_group(noisy.segments, is_chosen_BL & ~masked_BL & (own_BL != noisy.clean)) > 0
    return _led_away(state, strays_BL, jnp.where(masked_BL, choice_BL, own_BL), corruption)


def _groups(noisy: NoisyBatch, corruption: Corruption) -> jax.Array:
    """Returns [B, L] int32: the number of each token's group. A sampler fills a group (block or answer) together."""
    if corruption.diffusion.attention != "block":
        return noisy.segments
    first_BL = corruption.diffusion.block_starts(noisy.positions, noisy.prompt_lengths)
    return noisy.segments * noisy.tokens.shape[1] + first_BL


def least_confident(
    confidence_BL: jax.Array, open_BL: jax.Array, group_BL: jax.Array, count_BL: jax.Array
) -> jax.Array:
    """Returns [B, L] bool: the `count_BL` least confident open positions of each group; among equals, the rightmost."""
    confidence_BL = jnp.where(open_BL, confidence_BL, jnp.inf)
    position_L = jnp.arange(confidence_BL.shape[1])
    mine, other = confidence_BL[:, :, None], confidence_BL[:, None, :]
    lower_BLL = (other < mine) | ((other == mine) & (position_L[None, :] > position_L[:, None]))
    return open_BL & (in_group(group_BL, open_BL, lower_BLL) < count_BL)


def _led_away(state: NoisyBatch, strays_BL: jax.Array, own_BL: jax.Array, corruption: Corruption) -> NoisyBatch:
    """Returns `state` with the examples `strays_BL` replaced by the model's text `own_BL`, for the teacher alone.

    In these, nothing is scored after the first end-of-sequence token that the model wrote.
    """
    clean_BL = jnp.where(strays_BL & state.candidates, own_BL, state.clean)
    moved = hide(state.replace(clean=clean_BL), state.masked, state.rates, corruption)
    is_eos_BL = state.candidates & (clean_BL == corruption.loss.eos_token_id)
    before_LL = jnp.tri(is_eos_BL.shape[1], k=-1)
    ended_BL = in_group(state.segments, is_eos_BL, before_LL[None]) > 0
    return moved.replace(
        weights=jnp.where(strays_BL, 0.0, moved.weights),
        teacher_weights=jnp.where(strays_BL & ended_BL, 0.0, moved.teacher_weights),
    )
