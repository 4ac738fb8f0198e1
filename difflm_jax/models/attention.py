"""Who attends to whom: one mask function for every attention rule, and the product itself."""

import jax
import jax.numpy as jnp

ATTENTION_RULES = ("full", "prefix", "causal")
QUERY_CHUNK = 256  # queries whose scores exist at once


def attention_mask(
    rule: str,
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    key_valid_BS: jax.Array,
    prompt_lengths_B: jax.Array,
) -> jax.Array:
    """[B, T, S] bool: True where a query may see a key. Positions count real tokens from 0.

    `full`: every real token. `causal`: the key is not after the query. `prefix`: a prompt token (position below
    `prompt_lengths_B`) sees what `causal` lets it see, an answer token sees everything, so that the keys and values
    of a prompt do not depend on its answer.
    """
    valid_BTS = jnp.broadcast_to(key_valid_BS[:, None, :], (*query_positions_BT.shape, key_positions_BS.shape[1]))
    if rule == "full":
        return valid_BTS
    not_after_BTS = key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
    if rule == "causal":
        return valid_BTS & not_after_BTS
    if rule == "prefix":
        in_answer_BT = query_positions_BT >= prompt_lengths_B[:, None]
        return valid_BTS & (not_after_BTS | in_answer_BT[:, :, None])
    raise ValueError(f"attention rule {rule!r} is not one of {ATTENTION_RULES}")


def positions_of(valid_BL: jax.Array) -> jax.Array:
    """[B, L] int32: the index of each token among the real tokens of its row, for padding on either side."""
    return jnp.maximum(jnp.cumsum(valid_BL.astype(jnp.int32), axis=1) - 1, 0)


def attend(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention, softmax in float32; a query row that sees nothing gives finite values, not NaN.

    More than `QUERY_CHUNK` queries are taken in turn, and their scores made again in the backward pass: scores of all
    queries at once were the largest arrays of a training step (float32 [B, H, T, S], several times over).
    """
    length = q_BTHE.shape[1]
    if length <= QUERY_CHUNK:
        return _attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS)
    chunks = -(-length // QUERY_CHUNK)
    size = -(-length // chunks)

    def split(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, [(0, 0), (0, chunks * size - length), *[(0, 0)] * (x_BT.ndim - 2)])
        return jnp.moveaxis(padded.reshape(x_BT.shape[0], chunks, size, *x_BT.shape[2:]), 1, 0)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(chunk[0], k_BSKE, v_BSKE, chunk[1])

    y = jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), (split(q_BTHE), split(mask_BTS)))
    return jnp.moveaxis(y, 0, 1).reshape(q_BTHE.shape[0], chunks * size, *q_BTHE.shape[2:])[:, :length]


def _attend(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTHE, k_BSKE, v_BSKE, mask=mask_BTS[:, None], implementation="xla")
