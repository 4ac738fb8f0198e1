"""Who attends to whom: one mask function for every attention rule, and the product itself."""

import jax
import jax.numpy as jnp

ATTENTION_RULES = ("full", "prefix", "causal")


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
    """Grouped-query attention, softmax in float32; a query row that sees nothing gives finite values, not NaN."""
    return jax.nn.dot_product_attention(q_BTHE, k_BSKE, v_BSKE, mask=mask_BTS[:, None], implementation="xla")
