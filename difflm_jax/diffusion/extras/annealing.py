"""From causal to bidirectional by degrees: edges to later tokens opened at random, or blocks that grow.

Both are functions of the number of the step, traced, so that nothing is compiled again on the way; evaluations and
generation use the rule that they lead to.
"""

import dataclasses

import jax
import jax.numpy as jnp

from difflm_jax.diffusion.corruption import OPENING_STREAM, Corruption, NoisyBatch
from difflm_jax.diffusion.extras.step import Step
from difflm_jax.ops.random import fold_seeds, uniform


def annealed(noisy: NoisyBatch, step: Step) -> NoisyBatch:
    """The batch with the edges to later tokens that are open at this step, if annealing is on."""
    extras = step.corruption.extras
    if not extras.anneal_steps:
        return noisy
    share = open_share(step.index, extras.anneal_steps, extras.anneal_power)
    return noisy.replace(open=open_edges(step.seeds(OPENING_STREAM), noisy.positions, share))


def grown(corruption: Corruption, index: jax.Array | int) -> Corruption:
    """The rule with the blocks that there are at step `index`, if blocks grow."""
    diffusion, steps = corruption.diffusion, corruption.extras.block_growth_steps
    if not steps:
        return corruption
    block_length = grown_block_length(index, steps, diffusion.block_length)
    return dataclasses.replace(corruption, diffusion=dataclasses.replace(diffusion, block_length=block_length))


def open_share(index: jax.Array | int, steps: int, power: float) -> jax.Array:
    """Share of the edges to later tokens that are open at step `index` (from 0): min(1, (index + 1) / steps) ** power.

    Power 1 is DiffuLLaMA's line (arXiv:2410.17891); above 1 the curve opens slowly first, which is gentler: the first
    percent of open edges does a third of the damage.
    """
    return jnp.minimum(1.0, (jnp.asarray(index, jnp.float32) + 1.0) / steps) ** power


def open_edges(seeds_BL: jax.Array, positions_BL: jax.Array, share: jax.Array) -> jax.Array:
    """[B, L, L] bool (query, key): True with probability `share`, one draw for all layers and heads.

    A draw is a function of (seed of the query's token, position of the key) alone: padding and packing change none.
    """
    return (
        jax.vmap(lambda seeds_L, positions_L: uniform(fold_seeds(seeds_L[:, None], positions_L[None, :])))(
            seeds_BL, positions_BL
        )
        < share
    )


def grown_block_length(index: jax.Array | int, steps: int, block_length: int) -> jax.Array:
    """int32 []: 1, 2, 4, ... and `block_length` from step `steps` on, equally long at each length before.

    Block length 1 with the logit shift is the causal base itself.
    """
    doublings = (block_length - 1).bit_length()
    stage = jnp.minimum(jnp.asarray(index, jnp.int32) * doublings // steps, doublings)
    return jnp.minimum(jnp.left_shift(1, stage), block_length).astype(jnp.int32)
