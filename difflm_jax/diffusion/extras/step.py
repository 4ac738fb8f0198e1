"""What an extra is given about the step whose noisy batch it changes."""

import dataclasses
from collections.abc import Callable

import jax

from difflm_jax.diffusion.corruption import Corruption, NoisyBatch
from difflm_jax.ops.cross_entropy import Scores

# (noisy batch, [B, L] float32 weights, not zero at the positions to score) -> (any, scores), without gradient
OwnScores = Callable[[NoisyBatch, jax.Array], tuple[jax.Array, Scores]]


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step: its rule, its number, its noise, and the trained model as a function."""

    corruption: Corruption
    index: jax.Array | int
    seeds: Callable[[int], jax.Array]  # number of a stream -> [B, L], one seed per token
    example_seeds: Callable[[int], jax.Array]  # number of a stream -> [B, L], one seed per example
    own_scores: OwnScores
