"""Attention masks and cache windows: the inputs that tell the transformer which keys each query sees."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class View:
    """The keys that each query may see. A layer can narrow the mask by distance, from the positions."""

    mask: jax.Array  # [B, T, S] bool, True where a query may see a key
    query_positions: jax.Array  # [B, T] int32, the index of a query among the tokens that it could see
    key_positions: jax.Array  # [B, S] int32
    lengths: jax.Array | None = None  # [B] int32: each query sees exactly the first `lengths` keys; None: read the mask

    def within(self, window: jax.Array | int) -> "View":
        """Returns the view narrowed to keys at a distance below `window` on either side. Its `lengths` are None."""
        distance_BTS = jnp.abs(self.query_positions[:, :, None] - self.key_positions[:, None, :])
        return self.replace(mask=self.mask & (distance_BTS < window), lengths=None)


@struct.dataclass
class Window:
    """The position of the queries among S columns whose keys are in the `cache` collection.

    The queries are columns `start`, `start` + 1, ... Columns before `written_from` keep and use their cached keys; the
    others overwrite theirs. Both fields are one column for all rows [], or one per row [B].
    """

    start: jax.Array | int
    written_from: jax.Array | int

    def placed(self, new_BTKE: jax.Array, cached_BSKE: jax.Array) -> jax.Array:
        """Returns `cached_BSKE` with the columns from `written_from` on overwritten by `new_BTKE`."""
        length, start, written_from = new_BTKE.shape[1], jnp.asarray(self.start), jnp.asarray(self.written_from)
        if start.ndim == 0:
            old_BTKE = jax.lax.dynamic_slice_in_dim(cached_BSKE, start, length, axis=1)
        else:
            old_BTKE = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length))(cached_BSKE, start)
        is_written = start[..., None] + jnp.arange(length) >= written_from[..., None]
        new_BTKE = jnp.where(is_written[..., None, None], new_BTKE, old_BTKE)
        if start.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(cached_BSKE, new_BTKE, start, axis=1)
        return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(cached_BSKE, new_BTKE, start, 0)


def positions_of(valid_BL: jax.Array) -> jax.Array:
    """Returns the index [B, L] int32 of each token among the real tokens of its row. Padding may be on either side."""
    return jnp.maximum(jnp.cumsum(valid_BL.astype(jnp.int32), axis=1) - 1, 0)
