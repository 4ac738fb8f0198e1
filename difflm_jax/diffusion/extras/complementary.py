"""Complementary masks: each row is used twice, with its mask and with the complement, so that every token is scored.

Used by SMDM (arXiv:2410.18514), LLaDA2 and coupled-GRPO (arXiv:2506.20639). A pair removes the variance of the mask,
and no token of a small data set is left out by chance.
"""

import jax
import jax.numpy as jnp

from difflm_jax.diffusion.corruption import Corruption, NoisyBatch, hide
from difflm_jax.diffusion.extras.step import Step
from difflm_jax.ops.random import fold_seeds


def paired(noisy: NoisyBatch, step: Step) -> NoisyBatch:
    """Applies `complementary_pairs` if they are on."""
    return complementary_pairs(noisy, step.corruption) if step.corruption.extras.complementary else noisy


def complementary_pairs(noisy: NoisyBatch, corruption: Corruption) -> NoisyBatch:
    """Returns [2 B, L]: the rows of `noisy`, then the same rows with the complement hidden, at rates 1 - rate."""
    complement = noisy.candidates & ~noisy.masked
    other = hide(noisy, complement, 1.0 - noisy.rates, corruption)
    if noisy.dropout_seeds is not None:
        other = other.replace(dropout_seeds=fold_seeds(noisy.dropout_seeds, 1))
    return jax.tree.map(lambda *pair: jnp.concatenate(pair), noisy, other)
