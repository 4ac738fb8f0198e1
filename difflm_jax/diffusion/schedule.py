"""How many masks of a block are committed at each step."""

import jax


def even_quota(masks_B: jax.Array, step: jax.Array, steps: int) -> jax.Array:
    """[B] int32: `masks_B` split over `steps`, the remainder going to the first steps.

    The rule of the original system and of LLaDA's `get_num_transfer_tokens` (arXiv:2502.09992): floor(n / S), plus one
    in the first n mod S steps.
    """
    return masks_B // steps + (step < masks_B % steps)
