"""Who attends to whom: one mask function for every attention rule, and the product itself."""

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.bits import named

ATTENTION_RULES = ("full", "prefix", "block", "block_causal", "causal")
BLOCK_RULES = ("block", "block_causal")  # those that have a block length
QUERY_CHUNK = 256  # queries whose scores exist at once
ATTENTION_OUTPUT = "attention_output"  # what the backward pass needs of the forward pass: its name in remat policies
SHARED_SEGMENT = -1  # of tokens that every example of a row begins with, where they stand in it once
UNSEEN = -1e30  # the score of a key that a query does not see; finite, so that differences of scores are


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


@jax.custom_vjp
def attend(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """[B, T, H, E]: grouped-query attention, softmax in float32; a query that sees nothing gives zero.

    The backward pass is FlashAttention-2's (arXiv:2307.08691, algorithm 2): it keeps the result and one number for each
    query and head, and makes the scores again. No more than `QUERY_CHUNK` queries have scores at once; those of all
    were the largest arrays of a training step (float32 [B, H, T, S], several times over).
    """
    return _attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS)[0]


def _attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS):
    """(the result, log of the sum of exp(scores) of each query [B, K, T, G])."""
    k_BKSE, v_BKSE = _heads_first(k_BSKE), _heads_first(v_BSKE)

    def of_chunk(chunk):
        q_BKTGE, mask_BTS = chunk
        scores_BKTGS = _scores(q_BKTGE, k_BKSE, mask_BTS)
        largest_BKTG = scores_BKTGS.max(axis=-1)
        p_BKTGS = _seen(jnp.exp(scores_BKTGS - largest_BKTG[..., None]), mask_BTS)
        sum_BKTG = jnp.maximum(p_BKTGS.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
        y_BKTGE = _einsum("bktgs,bkse->bktge", p_BKTGS.astype(v_BKSE.dtype), v_BKSE) / sum_BKTG[..., None]
        return y_BKTGE.astype(v_BKSE.dtype), largest_BKTG + jnp.log(sum_BKTG)

    y_BKTGE, lse_BKTG = _in_chunks(of_chunk, (_grouped(q_BTHE, k_BSKE), mask_BTS), q_BTHE.shape[1])
    return _ungrouped(y_BKTGE), lse_BKTG


def _attend_forward(q_BTHE, k_BSKE, v_BSKE, mask_BTS):
    y_BTHE, lse_BKTG = _attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS)
    y_BTHE, lse_BKTG = (named(x, ATTENTION_OUTPUT) for x in (y_BTHE, lse_BKTG))
    return y_BTHE, (q_BTHE, k_BSKE, v_BSKE, mask_BTS, y_BTHE, lse_BKTG)


def _attend_backward(saved, dy_BTHE):
    q_BTHE, k_BSKE, v_BSKE, mask_BTS, y_BTHE, lse_BKTG = saved
    k_BKSE, v_BKSE = _heads_first(k_BSKE), _heads_first(v_BSKE)
    dtype = q_BTHE.dtype
    inner_BTH = (dy_BTHE.astype(jnp.float32) * y_BTHE.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def of_chunk(chunk):
        q_BKTGE, dy_BKTGE, mask_BTS, lse_BKTG, inner_BKTG1 = chunk
        p_BKTGS = _seen(jnp.exp(_scores(q_BKTGE, k_BKSE, mask_BTS) - lse_BKTG[..., None]), mask_BTS)
        dp_BKTGS = _einsum("bktge,bkse->bktgs", dy_BKTGE, v_BKSE)
        ds_BKTGS = (p_BKTGS * (dp_BKTGS - inner_BKTG1) * _scale(q_BTHE)).astype(dtype)
        dq_BKTGE = _einsum("bktgs,bkse->bktge", ds_BKTGS, k_BKSE).astype(dtype)
        # The small operand first: it is the one that is transposed, and scores transposed took a fifth of a CPU's step.
        dk_BKES = _einsum("bktge,bktgs->bkes", q_BKTGE, ds_BKTGS)
        return dq_BKTGE, dk_BKES, _einsum("bktge,bktgs->bkes", dy_BKTGE, p_BKTGS.astype(dtype))

    grouped = (_grouped(q_BTHE, k_BSKE), _grouped(dy_BTHE, k_BSKE))
    chunks = (*grouped, mask_BTS, lse_BKTG, _grouped(inner_BTH, k_BSKE))
    dq_BKTGE, *of_keys = _in_chunks(of_chunk, chunks, q_BTHE.shape[1], sums=2)
    return _ungrouped(dq_BKTGE), *(jnp.einsum("bkes->bske", x_BKES).astype(dtype) for x_BKES in of_keys), None


attend.defvjp(_attend_forward, _attend_backward)


def _in_chunks(function, arrays, length: int, sums: int = 0):
    """`function(arrays)`, by chunks of their queries where there are more than `QUERY_CHUNK` of the `length`.

    Queries are the last axis but two, but of masks [B, T, S] and of numbers [B, K, T, G] the last but one. The last
    `sums` results are summed over the chunks, the others joined again.
    """
    if length <= QUERY_CHUNK:
        return function(arrays)
    chunks = -(-length // QUERY_CHUNK)
    size = -(-length // chunks)

    def split(x):
        axis = _query_axis(x)
        padding = [(0, chunks * size - length) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.moveaxis(jnp.pad(x, padding).reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)

    def joined(x):
        axis = _query_axis(x[0])
        x = jnp.moveaxis(x, 0, axis)
        return jax.lax.slice_in_dim(x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), 0, length, axis=axis)

    results = jax.lax.map(function, tuple(split(x) for x in arrays))
    first_sum = len(results) - sums
    return *(joined(x) for x in results[:first_sum]), *(x.sum(axis=0) for x in results[first_sum:])


def _query_axis(x) -> int:
    return 2 if x.ndim > 3 else 1


# Both by arithmetic: the other value of a `jnp.where` is an array of the size of the scores to jax, which it keeps.
def _scores(q_BKTGE, k_BKSE, mask_BTS):
    scores_BKTGS = _einsum("bktge,bkse->bktgs", q_BKTGE, k_BKSE) * _scale(q_BKTGE)
    return scores_BKTGS + (mask_BTS[:, None, :, None].astype(jnp.float32) - 1.0) * -UNSEEN


def _seen(x_BKTGS, mask_BTS):
    return x_BKTGS * mask_BTS[:, None, :, None].astype(jnp.float32)


def _scale(q) -> float:
    return q.shape[-1] ** -0.5


def _einsum(formula: str, a, b):
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _heads_first(x_BSKE):
    """The heads before the tokens, or behind them again."""
    return jnp.swapaxes(x_BSKE, 1, 2)


def _grouped(x_BTHE, k_BSKE):
    """[B, K, T, G, E]: the queries of a key's heads side by side, so that a product with it has T * G rows."""
    batch, length, heads, width = x_BTHE.shape
    kv_heads = k_BSKE.shape[2]
    return _heads_first(x_BTHE.reshape(batch, length, kv_heads, heads // kv_heads, width))


def _ungrouped(x_BKTGE):
    x_BTKGE = _heads_first(x_BKTGE)
    return x_BTKGE.reshape(*x_BTKGE.shape[:2], -1, x_BTKGE.shape[-1])
