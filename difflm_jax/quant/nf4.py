"""The 4-bit NormalFloat of QLoRA (arXiv:2305.14314): sixteen levels at the quantiles of a normal distribution."""

import jax
import jax.numpy as jnp
import numpy as np

# The levels of bitsandbytes (functional.py), which all NF4 checkpoints use. Code i stands for LEVELS[i].
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
TINY = np.finfo(np.float32).tiny  # the smallest guard that XLA does not flush to zero on CPUs
_THRESHOLDS = (LEVELS[:-1] + LEVELS[1:]) / 2


def encode(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises float32 blocks [..., G] to (codes uint8 [..., G] in 0..15, scales float32 [...]).

    The scale is the largest magnitude of the block. A code is the level nearest to x / scale, the lower one at a tie.
    Operations and their order are those of bitsandbytes, so the codes are equal byte for byte.
    """
    scales = jnp.abs(blocks).max(axis=-1)
    normalised = jnp.clip(blocks * (1.0 / jnp.maximum(scales, TINY))[..., None], -1.0, 1.0)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for threshold in _THRESHOLDS:
        codes += (normalised > threshold).astype(jnp.uint8)
    return codes, scales


def decode(codes: jax.Array) -> jax.Array:
    """Returns the float32 levels of `codes` in 0..15.

    Uses a tree of selects over the bits of a code, not a table look-up. On a CPU with vector units the tree is as fast
    as a plain conversion (twice as fast as a gather). A TPU has no fast gather.
    """
    # Add a zero that depends on the codes. Otherwise jax hoists the 16 levels out of the layer loop as 16 weight-sized
    # arrays (5 times slower).
    nothing = (codes.reshape(-1)[0] & 0).astype(jnp.float32)
    codes = codes.astype(jnp.int32)
    values = [level + nothing for level in LEVELS]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
