"""Gradual change from causal to bidirectional attention: edges to later tokens open at random, or blocks grow.

Both are functions of the step number, which is traced, so no step is recompiled. Evaluations and generation use the
final rule.
"""

import dataclasses

import jax
import jax.numpy as jnp

from difflm_jax.diffusion.corruption import OPENING_STREAM, Corruption, NoisyBatch
from difflm_jax.diffusion.extras.step import Step
from difflm_jax.ops.random import fold_seeds, uniform


def annealed(noisy: NoisyBatch, step: Step) -> NoisyBatch:
    """Returns `noisy` with the edges to later tokens that are open at this step; unchanged if annealing is off."""
    extras = step.corruption.extras
    if not extras.anneal_steps:
        return noisy
    share = open_share(step.index, extras.anneal_steps, extras.anneal_power)
    return noisy.replace(open=open_edges(step.seeds(OPENING_STREAM), noisy.positions, share))


def grown(corruption: Corruption, index: jax.Array | int) -> Corruption:
    """Returns `corruption` with the block length of step `index`; unchanged if blocks do not grow."""
    diffusion, steps = corruption.diffusion, corruption.extras.block_growth_steps
    if not steps:
        return corruption
    block_length = grown_block_length(index, steps, diffusion.block_length)
    return dataclasses.replace(corruption, diffusion=dataclasses.replace(diffusion, block_length=block_length))


def open_share(index: jax.Array | int, steps: int, power: float) -> jax.Array:
    """Returns the share of edges to later tokens that are open at step `index`: min(1, (index + 1) / steps) ** power.

    `index` counts from 0. Power 1 is the linear schedule of DiffuLLaMA (arXiv:2410.17891). A power above 1 opens edges
    slowly at first, which is gentler: the first percent of open edges does a third of the damage.
    """
    return jnp.minimum(1.0, (jnp.asarray(index, jnp.float32) + 1.0) / steps) ** power


def open_edges(seeds_BL: jax.Array, positions_BL: jax.Array, share: jax.Array) -> jax.Array:
    """Returns [B, L, L] bool (query, key): True with probability `share`, one draw for all layers and heads.

    A draw depends only on (seed of the query's token, position of the key), so padding and packing do not change it.
    """
    return (
        jax.vmap(lambda seeds_L, positions_L: uniform(fold_seeds(seeds_L[:, None], positions_L[None, :])))(
            seeds_BL, positions_BL
        )
        < share
    )


def grown_block_length(index: jax.Array | int, steps: int, block_length: int) -> jax.Array:
    """Returns the block length int32 [] at step `index`: 1, 2, 4, ..., and `block_length` from step `steps` on.

    Each smaller length lasts equally many steps. Block length 1 with the logit shift is the causal base itself.
    """
    doublings = (block_length - 1).bit_length()
    stage = jnp.minimum(jnp.asarray(index, jnp.int32) * doublings // steps, doublings)
    return jnp.minimum(jnp.left_shift(1, stage), block_length).astype(jnp.int32)
