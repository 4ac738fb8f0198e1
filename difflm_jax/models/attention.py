"""Who attends to whom: one mask function for every attention rule."""

import jax
import jax.numpy as jnp
from flax import struct

ATTENTION_RULES = ("full", "prefix", "block", "block_causal", "causal")
BLOCK_RULES = ("block", "block_causal")  # those that have a block length
SHARED_SEGMENT = -1  # of tokens that every example of a row begins with, where they stand in it once


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
    and values of a prompt do not depend on its answer. `block`: an answer is cut into blocks of `block_length` from its
    start; a token sees its own block and what precedes it, so neither a prompt nor a finished block depends on what
    follows.
    `block_causal`: the same with blocks counted from the first token on, whether it is of the prompt or not (SDAR,
    arXiv:2510.06303).

    `noisy_T` [T] bool (T = S) is for block diffusion's training input, a noisy and a clean copy of each row
    (BD3-LM, arXiv:2503.09573): a noisy token sees its own noisy block and the clean tokens before that block; a clean
    token sees clean tokens by the rule.

    `segments_BT` (T = S) is for rows of several examples, whose positions each begin at 0: a token sees its own, and
    what all of them begin with. By the rules under which a prompt does not depend on what follows it the keys and
    values of that are the same for each of them.
    `open_BTS` bool is for attention annealing: of what the rule allows, a later token is seen only where it is True.
    """
    valid_BTS = jnp.broadcast_to(key_valid_BS[:, None, :], (*query_positions_BT.shape, key_positions_BS.shape[1]))
    if segments_BT is not None:
        valid_BTS = valid_BTS & same_example(segments_BT)
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
    own_BTS, clean_BTS = noisy_query & not_after_BTS & ~before_BTS, not_after_BTS & (~noisy_query | before_BTS)
    return valid_BTS & jnp.where(noisy_key, own_BTS, clean_BTS)


def same_example(segments_BT: jax.Array) -> jax.Array:
    """[B, T, T] bool: whether a token (the last axis) belongs to the example of another, or to all."""
    key_B1T = segments_BT[:, None, :]
    return (segments_BT[:, :, None] == key_B1T) | (key_B1T == SHARED_SEGMENT)


def block_starts(
    positions_BL: jax.Array, prompt_lengths: jax.Array, block_length: jax.Array | int, rule: str = "block"
) -> jax.Array:
    """[B, L] first position of the block that each position is in; under `block` a prompt token is one of its own."""
    return _own_block(rule, positions_BL, _at_tokens(prompt_lengths), block_length)[0]


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
