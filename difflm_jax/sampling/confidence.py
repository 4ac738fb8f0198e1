"""Confidence scores: how confident the model is of its token at each position. Masks are ranked by them.

A score is a function (logits, chosen tokens, noise) -> [B, T], larger where more confident. `noise` is uniform in
[0, 1).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Ranking = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def max_logit(logits_BTV: jax.Array, tokens_BT: jax.Array, _noise_BT: jax.Array) -> jax.Array:
    """The raw logit of the chosen token, which is the original system's confidence."""
    return jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]


def log_odds(logits_BTV: jax.Array, tokens_BT: jax.Array, noise_BT: jax.Array) -> jax.Array:
    """log p / (1 - p) of the chosen token: ordered as p, without ties where float32 rounds p to 1."""
    own_BT = max_logit(logits_BTV, tokens_BT, noise_BT)
    is_chosen_BTV = jnp.arange(logits_BTV.shape[-1]) == tokens_BT[..., None]
    return own_BT - jax.nn.logsumexp(jnp.where(is_chosen_BTV, -jnp.inf, logits_BTV), axis=-1)


def margin(logits_BTV: jax.Array, _tokens_BT: jax.Array, _noise_BT: jax.Array) -> jax.Array:
    """Probability of the most likely token minus that of the second: Dream's `topk_margin`."""
    # Take two maxima: on CPU `jax.lax.top_k` sorts the vocabulary, which took most of a pass.
    p_BTV = jax.nn.softmax(logits_BTV, axis=-1)
    is_best_BTV = jnp.arange(p_BTV.shape[-1]) == p_BTV.argmax(axis=-1, keepdims=True)
    return p_BTV.max(axis=-1) - jnp.where(is_best_BTV, 0.0, p_BTV).max(axis=-1)


def negative_entropy(logits_BTV: jax.Array, _tokens_BT: jax.Array, _noise_BT: jax.Array) -> jax.Array:
    """Negative entropy Σ p log p, in nats."""
    log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    return jnp.where(jnp.isneginf(log_p_BTV), 0.0, jnp.exp(log_p_BTV) * log_p_BTV).sum(axis=-1)


def uniform(_logits_BTV: jax.Array, _tokens_BT: jax.Array, noise_BT: jax.Array) -> jax.Array:
    """A random score: `noise_BT` itself."""
    return noise_BT


def from_the_left(_logits_BTV: jax.Array, tokens_BT: jax.Array, _noise_BT: jax.Array) -> jax.Array:
    """A score that is higher further to the left."""
    return jnp.broadcast_to(-jnp.arange(tokens_BT.shape[1], dtype=jnp.float32), tokens_BT.shape)


@dataclasses.dataclass(frozen=True)
class Confidence:
    """A score and its input.

    of_drawn: whether the score reads the distribution that tokens are drawn from, after temperature, top-p and top-k,
      as Dream does; False: the model's logits.
    is_log_odds: whether the sigmoid of the score is a probability.
    """

    score: Ranking
    of_drawn: bool = False
    is_log_odds: bool = False

    def value(self, score_BT: jax.Array) -> jax.Array:
        """The score on the scale of the papers: a probability if it is log-odds, unchanged otherwise."""
        return jax.nn.sigmoid(score_BT) if self.is_log_odds else score_BT


CONFIDENCES = {
    "confidence": Confidence(max_logit),
    "probability": Confidence(log_odds, is_log_odds=True),  # LLaDA's low-confidence remasking (arXiv:2502.09992)
    "maskgit_plus": Confidence(log_odds, of_drawn=True, is_log_odds=True),  # these three: Dream (arXiv:2508.15487)
    "topk_margin": Confidence(margin, of_drawn=True),
    "entropy": Confidence(negative_entropy, of_drawn=True),
    "left_to_right": Confidence(from_the_left),
    "random": Confidence(uniform),
    "origin": Confidence(uniform),  # each mask is revealed at random: see `commit.by_rate`
}
