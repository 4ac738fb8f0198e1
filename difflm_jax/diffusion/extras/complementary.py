"""Complementary masks: each row is used twice, with its mask and with the complement, so that every token is scored.

Used by SMDM (arXiv:2410.18514), LLaDA2 and coupled-GRPO (arXiv:2506.20639): a pair has the variance of the mask out of
the way, and no token of a small data set is left out by chance.
"""

import jax
import jax.numpy as jnp

from difflm_jax.diffusion.corruption import Corruption, NoisyBatch, hide


def complementary_pairs(noisy: NoisyBatch, corruption: Corruption) -> NoisyBatch:
    """[2 B, L]: the rows of `noisy`, then the same rows with the complement hidden, at rates 1 - rate."""
    complement = noisy.candidates & ~noisy.masked
    other = hide(noisy, complement, 1.0 - noisy.rates, corruption)
    return jax.tree.map(lambda *pair: jnp.concatenate(pair), noisy, other)
