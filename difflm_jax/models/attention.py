"""Who attends to whom, as the transformer takes it: ready made."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class View:
    """What each query may see. The positions let a layer narrow the mask by distance."""

    mask: jax.Array  # [B, T, S] bool, True where a query may see a key
    query_positions: jax.Array  # [B, T] int32, the place of a query among the tokens that it could see
    key_positions: jax.Array  # [B, S] int32
    lengths: jax.Array | None = None  # [B] int32: every query sees exactly the first so many keys; None: not so

    def within(self, window: jax.Array | int) -> "View":
        """What of it is at a distance below `window`, before and after a query. It has a mask alone, and no lengths."""
        distance_BTS = jnp.abs(self.query_positions[:, :, None] - self.key_positions[:, None, :])
        return self.replace(mask=self.mask & (distance_BTS < window), lengths=None)


@struct.dataclass
class Window:
    """Where the queries lie among S columns whose keys are in the `cache` collection.

    The queries are columns `start`, `start` + 1, ... Those before `written_from` use, and keep, the keys that are
    cached for them; the others replace theirs.
    """

    start: jax.Array | int  # []
    written_from: jax.Array | int  # []


def positions_of(valid_BL: jax.Array) -> jax.Array:
    """[B, L] int32: the index of each token among the real tokens of its row, for padding on either side."""
    return jnp.maximum(jnp.cumsum(valid_BL.astype(jnp.int32), axis=1) - 1, 0)
