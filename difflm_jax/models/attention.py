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
    cached for them; the others replace theirs. Each is one column for all rows [], or one of each row [B].
    """

    start: jax.Array | int
    written_from: jax.Array | int

    def placed(self, new_BTKE: jax.Array, cached_BSKE: jax.Array) -> jax.Array:
        """`cached_BSKE` with what the queries replace."""
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
    """[B, L] int32: the index of each token among the real tokens of its row, for padding on either side."""
    return jnp.maximum(jnp.cumsum(valid_BL.astype(jnp.int32), axis=1) - 1, 0)
