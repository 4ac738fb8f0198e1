"""The weight of each token in the loss: a function of the hidden tokens, their mask rates and the ends of answers."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from difflm_jax.diffusion.segments import same_example
from difflm_jax.utils.settings import setting

if TYPE_CHECKING:
    from difflm_jax.diffusion.corruption import NoisyBatch

CART_P = 0.3  # Dream's value: how fast the weight of a visible token falls with its distance
_LOWEST_RATE = 1e-3  # keeps 1 / rate finite where nothing is hidden


@dataclasses.dataclass(frozen=True)
class LossRule:
    """The weight of each token in the loss.

    tokens: "all" scores every token that could have been hidden, "masked" those that are.
    weight: "uniform"; "inverse_rate", the 1/t of the diffusion bound (MDLM, arXiv:2406.07524; LLaDA,
      arXiv:2502.09992); "context", Dream's context-adaptive rescheduling (CART, arXiv:2508.15487), which gives a hidden
      token more weight the nearer visible tokens are.
    average: "tokens", or "answers": weights are divided by the number of candidates of the example, so every answer
      counts the same whatever its length (LLaDA's SFT loss).
    eos: "all", or "first": end-of-sequence tokens after the first of an answer are padding and not scored.
    """

    tokens: str = setting(
        "all",
        "Tokens that are scored: all that could have been hidden, or those that were.",
        choices=("all", "masked"),
        key="loss_tokens",
    )
    weight: str = setting(
        "uniform", "inverse_rate: by 1 / mask rate (MDLM, LLaDA); context: by visible neighbours (CART).",
        choices=("uniform", "inverse_rate", "context"), key="loss_weight",
    )  # fmt: skip
    average: str = setting(
        "tokens",
        "answers: every answer counts the same (LLaDA's SFT).",
        choices=("tokens", "answers"),
        key="loss_average",
    )
    eos: str = setting(
        "all", "first: EOS tokens that pad an answer are not scored.", choices=("all", "first"), key="eos_loss"
    )
    eos_token_id: int = -1


def loss_weights(noisy: "NoisyBatch", rule: LossRule) -> jax.Array:
    """Returns weights [B, L] float32 of the cross-entropy, zero where a token is not scored.

    Examples that share a row do not affect each other's weights.
    """
    scored_BL = noisy.candidates if rule.tokens == "all" else noisy.masked
    if rule.eos == "first":
        scored_BL = scored_BL & ~after_eos(noisy.clean, noisy.candidates, noisy.segments, rule.eos_token_id)
    weights_BL = jnp.ones_like(noisy.rates)
    if rule.weight == "inverse_rate":
        weights_BL = 1.0 / jnp.maximum(noisy.rates, _LOWEST_RATE)
    elif rule.weight == "context":
        weights_BL = context_weights(~noisy.masked, noisy.segments, noisy.positions)
    if rule.average == "answers":
        weights_BL = weights_BL / jnp.maximum(in_group(noisy.segments, noisy.candidates), 1)
    return jnp.where(scored_BL, weights_BL, 0.0)


def context_weights(visible_BL: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """Returns float32 [B, L]: half the sum over visible m != n of p (1 - p)^(|m - n| - 1), p = 0.3 (Dream's CART).

    Only tokens of the same example, and those shared by all examples, are counted.
    """
    distance_BLL = jnp.abs(positions_BL[:, :, None] - positions_BL[:, None, :])
    worth_BLL = jnp.where(distance_BLL > 0, CART_P * (1 - CART_P) ** (distance_BLL - 1.0), 0.0)
    counted_BLL = same_example(segments_BL) & (visible_BL & (segments_BL != 0))[:, None, :]
    return 0.5 * jnp.where(counted_BLL, worth_BLL, 0.0).sum(axis=2)


def after_eos(clean_BL: jax.Array, candidates_BL: jax.Array, segments_BL: jax.Array, eos_token_id: int) -> jax.Array:
    """Returns [B, L] bool: end-of-sequence tokens that directly follow another one in their answer."""
    is_eos_BL = candidates_BL & (clean_BL == eos_token_id)
    follows_BL = is_eos_BL[:, :-1] & (segments_BL[:, :-1] == segments_BL[:, 1:])
    return is_eos_BL & jnp.pad(follows_BL, ((0, 0), (1, 0)))


def in_group(group_BL: jax.Array, counted_BL: jax.Array, worth_BLL: jax.Array | float = 1.0) -> jax.Array:
    """Returns float32 [B, L]: for each position, the sum of `worth_BLL` over the counted positions of its group."""
    same_BLL = (group_BL[:, :, None] == group_BL[:, None, :]) & counted_BL[:, None, :]
    return jnp.where(same_BLL, worth_BLL, 0.0).sum(axis=2)
