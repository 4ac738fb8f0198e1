"""The sampler: a jitted loop over a typed carry that starts from masks and commits the most confident ones.

It knows a model only as `predict(tokens, start) -> logits`, so that it can be tested with any rigged function. Rows of
a batch never look at each other.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.diffusion.confidence import CONFIDENCES
from difflm_jax.diffusion.schedule import even_quota
from difflm_jax.parallel import varying_with

# (tokens [B, L], first column of the active block) -> float32 logits [B, block_length, V] of that block
Predict = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a generation: `num_blocks` blocks of `block_length` columns from column `first_column` on.

    Blocks are filled from left to right, each in `steps_per_block` forward passes. `stop_at_eos`: masks behind a
    committed end-of-sequence token are no longer filled.
    """

    first_column: int
    num_blocks: int
    block_length: int
    steps_per_block: int
    temperature: float = 0.0
    algorithm: str = "confidence"
    stop_at_eos: bool = True

    @property
    def steps(self) -> int:
        return self.num_blocks * self.steps_per_block


@struct.dataclass
class Carry:
    """State between two steps."""

    tokens: jax.Array  # [B, L] int32; a mask id where nothing is committed yet
    block_masks: jax.Array  # [B] int32, masks of the active block when it was entered
    passes: jax.Array  # [B] int32, forward passes that could still commit something in the row


def sample(
    predict: Predict,
    tokens_BL: jax.Array,
    fillable_BL: jax.Array,
    keys_B: jax.Array,
    plan: Plan,
    mask_token_id: int,
    eos_token_ids: tuple[int, ...],
) -> Carry:
    """Fills the masks of `tokens_BL` where `fillable_BL`; returns the last carry.

    `keys_B`: one key a row, used when `plan.temperature` > 0. The mask token is never produced.
    """
    batch = tokens_BL.shape[0]
    zeros_B = varying_with(jnp.zeros(batch, jnp.int32), tokens_BL)
    start = Carry(tokens_BL, zeros_B, zeros_B)
    column_L = jnp.arange(tokens_BL.shape[1])

    def body(step: jax.Array, carry: Carry) -> Carry:
        block, step_in_block = step // plan.steps_per_block, step % plan.steps_per_block
        first = plan.first_column + block * plan.block_length
        open_BL = fillable_BL & (carry.tokens == mask_token_id)
        if plan.stop_at_eos:
            open_BL &= ~_behind_eos(carry.tokens, column_L, plan.first_column, eos_token_ids)

        def window(x_BL: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x_BL, first, plan.block_length, axis=1)

        open_BT = window(open_BL)
        block_masks_B = jnp.where(step_in_block == 0, open_BT.sum(axis=1, dtype=jnp.int32), carry.block_masks)
        quota_B = even_quota(block_masks_B, step_in_block, plan.steps_per_block)

        logits_BTV = predict(carry.tokens, first).at[..., mask_token_id].set(-jnp.inf)
        chosen_BT = choose_tokens(logits_BTV, keys_B, step, plan.temperature)
        confidence_BT = CONFIDENCES[plan.algorithm](logits_BTV, chosen_BT)
        commit_BT = commit_most_confident(confidence_BT, open_BT, quota_B)
        filled_BT = jnp.where(commit_BT, chosen_BT, window(carry.tokens))
        return Carry(
            tokens=jax.lax.dynamic_update_slice_in_dim(carry.tokens, filled_BT, first, axis=1),
            block_masks=block_masks_B,
            passes=carry.passes + open_BL.any(axis=1),
        )

    return jax.lax.fori_loop(0, plan.steps, body, start)


def choose_tokens(logits_BTV: jax.Array, keys_B: jax.Array, step: jax.Array, temperature: float) -> jax.Array:
    """[B, T] int32: the argmax of the logits, or at `temperature` > 0 a draw from softmax(logits / temperature).

    The Gumbel noise is made in float32 from -log(-log u) in its exact form for small u, so that its upper tail is not
    cut off (which would act as a lower temperature).
    """
    if temperature > 0:
        length, vocabulary = logits_BTV.shape[1:]

        def noise(key: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(key, step), (length, vocabulary), jnp.float32, mode="high")

        logits_BTV = logits_BTV / temperature + jax.vmap(noise)(keys_B)
    return logits_BTV.argmax(axis=-1).astype(jnp.int32)


def commit_most_confident(confidence_BT: jax.Array, open_BT: jax.Array, quota_B: jax.Array) -> jax.Array:
    """[B, T] bool: the `quota_B` open positions of highest confidence in each row; the leftmost of equals first."""
    order_BT = jnp.argsort(jnp.where(open_BT, -confidence_BT, jnp.inf), axis=1, stable=True)
    rank_BT = jnp.argsort(order_BT, axis=1)
    return open_BT & (rank_BT < quota_B[:, None])


def _behind_eos(
    tokens_BL: jax.Array, column_L: jax.Array, first_column: int, eos_token_ids: tuple[int, ...]
) -> jax.Array:
    is_eos_BL = jnp.isin(tokens_BL, jnp.array(eos_token_ids)) & (column_L >= first_column)
    return jnp.cumsum(is_eos_BL, axis=1) > 0
