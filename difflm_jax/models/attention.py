"""Who attends to whom: one mask function for every attention rule, and the product itself."""

import jax
import jax.numpy as jnp
from flax import struct

ATTENTION_RULES = ("full", "prefix", "block", "block_causal", "causal")
BLOCK_RULES = ("block", "block_causal")  # those that have a block length
QUERY_CHUNK = 256  # queries whose scores exist at once


@struct.dataclass
class Window:
    """Where the queries lie in a canvas of S columns whose other keys are in the `cache` collection.

    The queries are columns `start`, `start` + 1, ... of the canvas. Those before `written_from` use, and keep, the keys
    that are cached for them; the others replace theirs.
    """

    positions: jax.Array  # [B, S] of the whole canvas
    valid: jax.Array  # [B, S]
    start: jax.Array | int  # []
    written_from: jax.Array | int  # []


def attention_mask(
    rule: str,
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    key_valid_BS: jax.Array,
    prompt_lengths: jax.Array,
    block_length: jax.Array | int = 0,
    noisy_T: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    open_BTS: jax.Array | None = None,
) -> jax.Array:
    """[B, T, S] bool: True where a query may see a key. Positions count real tokens from 0.

    `full`: every real token. `causal`: the key is not after the query. `prefix`: a prompt token (position below
    `prompt_lengths`, [B] or [B, T]) sees what `causal` lets it see, an answer token sees everything, so that the keys
    and values of a prompt do not depend on its answer. `block`: an answer is cut into blocks of `block_length` from its start; a
    token sees its own block and what precedes it, so that neither a prompt nor a finished block depends on what follows.
    `block_causal`: the same with blocks counted from the first token on, whether it is of the prompt or not (SDAR,
    arXiv:2510.06303).

    `noisy_T` [T] bool (T = S) is for block diffusion's training input, a noisy and a clean copy of each row
    (BD3-LM, arXiv:2503.09573): a noisy token sees its own noisy block and the clean tokens before that block; a clean
    token sees clean tokens by the rule.

    `segments_BT` (T = S) is for rows of several examples, whose positions each begin at 0: a token sees its own example.
    `open_BTS` bool is for attention annealing: of what the rule allows, a later token is seen only where it is True.
    """
    valid_BTS = jnp.broadcast_to(key_valid_BS[:, None, :], (*query_positions_BT.shape, key_positions_BS.shape[1]))
    if segments_BT is not None:
        valid_BTS = valid_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    if open_BTS is not None:
        valid_BTS &= (key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]) | open_BTS
    if rule == "full":
        return valid_BTS
    first_BT, last_BT = _own_block(rule, query_positions_BT, _at_tokens(prompt_lengths), block_length)
    key_B1S = key_positions_BS[:, None, :]
    not_after_BTS = key_B1S <= last_BT[:, :, None]
    if noisy_T is None:
        return valid_BTS & not_after_BTS
    before_BTS = key_B1S < first_BT[:, :, None]
    noisy_query, noisy_key = noisy_T[:, None], noisy_T[None, :]
    seen_BTS = jnp.where(noisy_key, noisy_query & not_after_BTS & ~before_BTS, not_after_BTS & (~noisy_query | before_BTS))
    return valid_BTS & seen_BTS


def block_starts(positions_BL: jax.Array, prompt_lengths: jax.Array, block_length: jax.Array | int) -> jax.Array:
    """[B, L] first position of the block that each position is in; a prompt token is a block of its own."""
    return _own_block("block", positions_BL, _at_tokens(prompt_lengths), block_length)[0]


def _at_tokens(prompt_lengths: jax.Array) -> jax.Array:
    """Prompt lengths of rows [B] as [B, 1]; those of tokens [B, T] as they are."""
    return prompt_lengths[:, None] if prompt_lengths.ndim == 1 else prompt_lengths


def _own_block(rule: str, positions_BT: jax.Array, prompts_BT: jax.Array, block_length: jax.Array | int):
    """(first, last) position of the span in which a token sees everything, besides all that precedes the span."""
    if rule == "causal":
        return positions_BT, positions_BT
    if rule in BLOCK_RULES and isinstance(block_length, int) and block_length < 1:
        raise ValueError(f"attention rule {rule!r} needs a block length, not {block_length}")
    if rule == "block_causal":
        first_BT = positions_BT - positions_BT % block_length
        return first_BT, first_BT + block_length - 1
    in_prompt_BT = positions_BT < prompts_BT
    if rule == "prefix":
        first_BT, last = prompts_BT, jnp.iinfo(jnp.int32).max
    elif rule == "block":
        first_BT = positions_BT - (positions_BT - prompts_BT) % block_length
        last = first_BT + block_length - 1
    else:
        raise ValueError(f"attention rule {rule!r} is not one of {ATTENTION_RULES}")
    return jnp.where(in_prompt_BT, positions_BT, first_BT), jnp.where(in_prompt_BT, positions_BT, last)


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
