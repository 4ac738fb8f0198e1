"""Masked attention and its gradient, in plain XLA."""

import functools

import jax
import jax.numpy as jnp

from difflm_jax.ops.cpu import named

QUERY_CHUNK = 256  # queries whose scores are in memory at once
ATTENTION_OUTPUT = "attention_output"  # name, in remat policies, of the outputs that the backward pass needs
UNSEEN = -1e30  # the score of a masked key; finite, so that differences of scores are finite


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask_BTS: jax.Array, softcap: float | None = None
) -> jax.Array:
    """[B, T, H, E]: grouped-query attention, softmax in float32; a query that sees nothing gives zero.

    A score x becomes c tanh(x / c) if there is a `softcap` c.

    The backward pass is FlashAttention-2's (arXiv:2307.08691, algorithm 2): it keeps the result and one number per
    query and head, and recomputes the scores. At most `QUERY_CHUNK` queries have scores at once. The scores of all
    queries would be the largest arrays of a training step (float32 [B, H, T, S], several times).
    """
    return _attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS, softcap)[0]


def _attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS, softcap):
    """Returns (the result, log of the sum of exp(scores) of each query [B, K, T, G])."""
    k_BKSE, v_BKSE = _heads_first(k_BSKE), _heads_first(v_BSKE)

    def of_chunk(chunk):
        q_BKTGE, mask_BTS = chunk
        scores_BKTGS = _masked(_scores(q_BKTGE, k_BKSE, softcap), mask_BTS)
        largest_BKTG = scores_BKTGS.max(axis=-1)
        p_BKTGS = _seen(jnp.exp(scores_BKTGS - largest_BKTG[..., None]), mask_BTS)
        sum_BKTG = jnp.maximum(p_BKTGS.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
        y_BKTGE = _einsum("bktgs,bkse->bktge", p_BKTGS.astype(v_BKSE.dtype), v_BKSE) / sum_BKTG[..., None]
        return y_BKTGE.astype(v_BKSE.dtype), largest_BKTG + jnp.log(sum_BKTG)

    y_BKTGE, lse_BKTG = _in_chunks(of_chunk, (_grouped(q_BTHE, k_BSKE), mask_BTS), q_BTHE.shape[1])
    return _ungrouped(y_BKTGE), lse_BKTG


def _attend_forward(q_BTHE, k_BSKE, v_BSKE, mask_BTS, softcap):
    y_BTHE, lse_BKTG = _attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS, softcap)
    y_BTHE, lse_BKTG = (named(x, ATTENTION_OUTPUT) for x in (y_BTHE, lse_BKTG))
    return y_BTHE, (q_BTHE, k_BSKE, v_BSKE, mask_BTS, y_BTHE, lse_BKTG)


def _attend_backward(softcap, saved, dy_BTHE):
    q_BTHE, k_BSKE, v_BSKE, mask_BTS, y_BTHE, lse_BKTG = saved
    k_BKSE, v_BKSE = _heads_first(k_BSKE), _heads_first(v_BSKE)
    dtype = q_BTHE.dtype
    inner_BTH = (dy_BTHE.astype(jnp.float32) * y_BTHE.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def of_chunk(chunk):
        q_BKTGE, dy_BKTGE, mask_BTS, lse_BKTG, inner_BKTG1 = chunk
        scores_BKTGS = _scores(q_BKTGE, k_BKSE, softcap)
        p_BKTGS = _seen(jnp.exp(_masked(scores_BKTGS, mask_BTS) - lse_BKTG[..., None]), mask_BTS)
        dp_BKTGS = _einsum("bktge,bkse->bktgs", dy_BKTGE, v_BKSE)
        ds_BKTGS = p_BKTGS * (dp_BKTGS - inner_BKTG1) * _scale(q_BTHE)
        if softcap is not None:
            ds_BKTGS *= 1.0 - jnp.square(scores_BKTGS / softcap)
        ds_BKTGS = ds_BKTGS.astype(dtype)
        dq_BKTGE = _einsum("bktgs,bkse->bktge", ds_BKTGS, k_BKSE).astype(dtype)
        # The small operand first, because XLA transposes it: transposing the scores took a fifth of a step on CPU.
        dk_BKES = _einsum("bktge,bktgs->bkes", q_BKTGE, ds_BKTGS)
        return dq_BKTGE, dk_BKES, _einsum("bktge,bktgs->bkes", dy_BKTGE, p_BKTGS.astype(dtype))

    grouped = (_grouped(q_BTHE, k_BSKE), _grouped(dy_BTHE, k_BSKE))
    chunks = (*grouped, mask_BTS, lse_BKTG, _grouped(inner_BTH, k_BSKE))
    dq_BKTGE, *of_keys = _in_chunks(of_chunk, chunks, q_BTHE.shape[1], sums=2)
    return _ungrouped(dq_BKTGE), *(jnp.einsum("bkes->bske", x_BKES).astype(dtype) for x_BKES in of_keys), None


attend.defvjp(_attend_forward, _attend_backward)


def attend_beside(
    q_BTHE: jax.Array,
    columns_BKSE: tuple[jax.Array, jax.Array],
    rows_BTKE: tuple[jax.Array, jax.Array],
    mask_BTS: jax.Array,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """[B, T, H, E]: attention of rows to cached columns and, under the same softmax, to each other.

    `columns_BKSE` are keys and values of S cached tokens, heads first; `rows_BTKE` those of the T queries. `mask_BTS`
    is [B, T, S + T]. `softcap` is as in `attend`, `sinks_H` as in `attention_kernels.attend_with`. Columns and rows,
    and their scores, are not concatenated. Meant for few rows: all scores are in memory at once. jax differentiates
    it; columns that are not trained cost nothing in the backward pass.
    """
    columns = columns_BKSE[0].shape[2]
    q_BKTGE = _grouped(q_BTHE, rows_BTKE[0])
    pairs = (columns_BKSE, tuple(_heads_first(x_BTKE) for x_BTKE in rows_BTKE))
    masks = (mask_BTS[..., :columns], mask_BTS[..., columns:])
    scores = [_masked(_scores(q_BKTGE, k_BKSE, softcap), mask) for (k_BKSE, _), mask in zip(pairs, masks, strict=True)]
    largest_BKTG = jax.lax.stop_gradient(jnp.maximum(*(x_BKTGS.max(axis=-1) for x_BKTGS in scores)))
    sink_KG = None
    if sinks_H is not None:
        sink_KG = sinks_H.astype(jnp.float32).reshape(q_BKTGE.shape[1], -1)[:, None]
        largest_BKTG = jnp.maximum(largest_BKTG, jax.lax.stop_gradient(sink_KG))
    largest_BKTG = largest_BKTG[..., None]
    p = [_seen(jnp.exp(x - largest_BKTG), mask) for x, mask in zip(scores, masks, strict=True)]
    sum_BKTG = p[0].sum(axis=-1) + p[1].sum(axis=-1)
    if sink_KG is not None:
        sum_BKTG += jnp.exp(sink_KG - largest_BKTG[..., 0])
    sum_BKTG = jnp.maximum(sum_BKTG, jnp.finfo(jnp.float32).tiny)
    y = [_einsum("bktgs,bkse->bktge", x.astype(v.dtype), v) for x, (_, v) in zip(p, pairs, strict=True)]
    return _ungrouped(((y[0] + y[1]) / sum_BKTG[..., None]).astype(q_BTHE.dtype))


def _in_chunks(function, arrays, length: int, sums: int = 0):
    """Computes `function(arrays)`, in chunks of queries if `length` exceeds `QUERY_CHUNK`.

    Queries are axis 1 of masks [B, T, S] and axis 2 of all other arrays. The last `sums` results are summed over the
    chunks, the others concatenated.
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


def _scores(q_BKTGE, k_BKSE, softcap):
    scores_BKTGS = _einsum("bktge,bkse->bktgs", q_BKTGE, k_BKSE) * _scale(q_BKTGE)
    return scores_BKTGS if softcap is None else softcap * jnp.tanh(scores_BKTGS / softcap)


# Arithmetic, as in `_seen`: with `jnp.where`, jax would save another array of the size of the scores.
def _masked(scores_BKTGS, mask_BTS):
    return scores_BKTGS + (mask_BTS[:, None, :, None].astype(jnp.float32) - 1.0) * -UNSEEN


def _seen(x_BKTGS, mask_BTS):
    return x_BKTGS * mask_BTS[:, None, :, None].astype(jnp.float32)


def _scale(q) -> float:
    return q.shape[-1] ** -0.5


def _einsum(formula: str, a, b):
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _heads_first(x_BSKE):
    """Swaps the axes of tokens and heads."""
    return jnp.swapaxes(x_BSKE, 1, 2)


def _grouped(x_BTHE, k_BSKE):
    """[B, K, T, G, E]: groups the query heads that share a key, so that a matmul with it has T * G rows."""
    batch, length, heads, width = x_BTHE.shape
    kv_heads = k_BSKE.shape[2]
    return _heads_first(x_BTHE.reshape(batch, length, kv_heads, heads // kv_heads, width))


def _ungrouped(x_BKTGE):
    x_BTKGE = _heads_first(x_BKTGE)
    return x_BTKGE.reshape(*x_BTKGE.shape[:2], -1, x_BTKGE.shape[-1])
