"""How sure the model is of the token that it would put at a position. Larger is surer; only the order matters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def max_logit(logits_BLV: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """[B, L] the raw logit of the chosen token: the original system's confidence."""
    return jnp.take_along_axis(logits_BLV, tokens_BL[..., None], axis=-1)[..., 0]


def probability(logits_BLV: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """[B, L] log softmax at the chosen token: LLaDA's low-confidence remasking (arXiv:2502.09992)."""
    return max_logit(logits_BLV, tokens_BL) - jax.nn.logsumexp(logits_BLV, axis=-1)


CONFIDENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "confidence": max_logit,
    "probability": probability,
}
