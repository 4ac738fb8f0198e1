"""FlashAttention-2 (arXiv:2307.08691) for TPUs, in Pallas: scores stay on the chip, fully masked tiles are skipped.

A tile of scores is [keys, queries]. Values per query (the largest score, the sum, a row of `lse`) then lie along the
lanes, as they do in memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from difflm_jax.errors import UserError
from difflm_jax.ops.attention import ATTENTION_OUTPUT, UNSEEN
from difflm_jax.ops.cpu import named

_LANES = 128
_LARGEST_TILE = 512  # of queries, and of keys
_VMEM = 100 * 2**20  # bytes that the compiler may use, of the 128 MiB of a v5e or v6e
_VMEM_OF_ROW = 72 * 2**20  # the part of it for the row of gradients that the backward pass stores


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash_attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS, interpret: bool = False) -> jax.Array:
    """[B, T, H, E]: the result of `attention.attend`, up to rounding in its dtype. A query that sees no key gives zero.

    The mask is read tile by tile, once for all query heads that share keys. `interpret` runs the kernels as XLA
    operations, for other devices. Raises `UserError` if rows are too long for the backward pass, which stores the
    gradient of such a group of heads on the chip.
    """
    return _forward(q_BTHE, k_BSKE, v_BSKE, mask_BTS, interpret)[0]


def _forward(q_BTHE, k_BSKE, v_BSKE, mask_BTS, interpret):
    """Returns (the result, log of the sum of exp(scores) per query [B, K, G, T + padding])."""
    q_BKGTE, k_BKSE, v_BKSE, mask_BST = _tiled(q_BTHE, k_BSKE, v_BSKE, mask_BTS)
    batch, kv_heads, group, queries, width = q_BKGTE.shape
    tile_T, tile_S = _tile(queries), _tile(k_BKSE.shape[2])
    of_queries = pl.BlockSpec((1, 1, group, tile_T, width), lambda b, k, i, j: (b, k, 0, i, 0))
    of_each_query = pl.BlockSpec((1, 1, group, tile_T), lambda b, k, i, j: (b, k, 0, i))
    of_keys = pl.BlockSpec((1, 1, tile_S, width), lambda b, k, i, j: (b, k, j, 0))
    of_both = pl.BlockSpec((1, tile_S, tile_T), lambda b, k, i, j: (b, j, i))
    y_BKGTE, lse_BKGT = pl.pallas_call(
        _forward_kernel,
        grid=(batch, kv_heads, queries // tile_T, k_BKSE.shape[2] // tile_S),
        in_specs=[of_queries, of_keys, of_keys, of_both],
        out_specs=[of_queries, of_each_query],
        out_shape=[
            _like(q_BKGTE, q_BKGTE.shape, v_BKSE.dtype),
            _like(q_BKGTE, (batch, kv_heads, group, queries), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((group, width, tile_T), jnp.float32),
            pltpu.VMEM((group, tile_T), jnp.float32),
            pltpu.VMEM((group, tile_T), jnp.float32),
        ],
        compiler_params=_parallel(3, 1),
        cost_estimate=_cost(2, q_BKGTE, k_BKSE, mask_BST),
        interpret=interpret,
        name="flash_attention",
    )(q_BKGTE, k_BKSE, v_BKSE, mask_BST)
    return _ungrouped(y_BKGTE, q_BTHE), lse_BKGT


def _forward_kernel(q_ref, k_ref, v_ref, mask_ref, y_ref, lse_ref, sum_ref, total_ref, largest_ref):
    """Processes one tile. `sum_ref` [G, E, T] and `total_ref` [G, T] are sums so far, relative to `largest_ref`."""
    group, tile_of_keys = q_ref.shape[2], pl.program_id(3)

    @pl.when(tile_of_keys == 0)
    def begin():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)

    seen_ST = mask_ref[0].astype(jnp.float32)

    @pl.when(jnp.max(seen_ST) > 0)
    def add():
        for g in range(group):
            row = slice(g, g + 1)
            scores_ST = _scores(q_ref[0, 0, g], k_ref[0, 0], seen_ST)
            largest_1T = jnp.maximum(largest_ref[row], scores_ST.max(axis=0, keepdims=True))
            p_ST = jnp.exp(scores_ST - largest_1T) * seen_ST
            shrunk_1T = jnp.exp(largest_ref[row] - largest_1T)
            total_ref[row] = total_ref[row] * shrunk_1T + p_ST.sum(axis=0, keepdims=True)
            sum_ref[g] = sum_ref[g] * shrunk_1T + _dot(v_ref[0, 0], p_ST.astype(v_ref.dtype), 0, 0)
            largest_ref[row] = largest_1T

    @pl.when(tile_of_keys == pl.num_programs(3) - 1)
    def end():
        total_GT = jnp.maximum(total_ref[...], jnp.finfo(jnp.float32).tiny)
        lse_ref[0, 0] = largest_ref[...] + jnp.log(total_GT)
        for g in range(group):
            y_ref[0, 0, g] = (sum_ref[g] / total_GT[g : g + 1]).T.astype(y_ref.dtype)


def _attend_forward(q_BTHE, k_BSKE, v_BSKE, mask_BTS, interpret):
    group = q_BTHE.shape[2] // k_BSKE.shape[2]
    longest = _VMEM_OF_ROW // (group * max(q_BTHE.shape[3], _LANES) * 8)  # a sum in float32, two copies of the result
    if q_BTHE.shape[1] > longest:
        raise UserError(
            f"attention_kernel='pallas': {q_BTHE.shape[1]} tokens a row are more than the chip holds gradients of "
            f"({longest} where {group} heads of {q_BTHE.shape[3]} share a key): lower max_length, or take "
            "attention_kernel=xla"
        )
    y_BTHE, lse_BKGT = _forward(q_BTHE, k_BSKE, v_BSKE, mask_BTS, interpret)
    y_BTHE, lse_BKGT = (named(x, ATTENTION_OUTPUT) for x in (y_BTHE, lse_BKGT))
    return y_BTHE, (q_BTHE, k_BSKE, v_BSKE, mask_BTS, y_BTHE, lse_BKGT)


def _attend_backward(interpret, saved, dy_BTHE):
    q_BTHE, k_BSKE, v_BSKE, mask_BTS, y_BTHE, lse_BKGT = saved
    q_BKGTE, k_BKSE, v_BKSE, mask_BST = _tiled(q_BTHE, k_BSKE, v_BSKE, mask_BTS)
    inner_BTH1 = (dy_BTHE.astype(jnp.float32) * y_BTHE.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dy_BKGTE, inner_BKGT1 = (_grouped(x, k_BSKE.shape[2]) for x in (dy_BTHE, inner_BTH1))
    batch, kv_heads, group, queries, width = q_BKGTE.shape
    tile_T, tile_S = _tile(queries), _tile(k_BKSE.shape[2])
    of_queries = pl.BlockSpec((1, 1, group, tile_T, width), lambda b, k, j, i: (b, k, 0, i, 0))
    of_each_query = pl.BlockSpec((1, 1, group, tile_T), lambda b, k, j, i: (b, k, 0, i))
    of_all_queries = pl.BlockSpec((1, 1, group, queries, width), lambda b, k, j, i: (b, k, 0, 0, 0))
    of_keys = pl.BlockSpec((1, 1, tile_S, width), lambda b, k, j, i: (b, k, j, 0))
    of_both = pl.BlockSpec((1, tile_S, tile_T), lambda b, k, j, i: (b, j, i))
    dq_BKGTE, *of_heads = pl.pallas_call(
        _backward_kernel,
        grid=(batch, kv_heads, k_BKSE.shape[2] // tile_S, queries // tile_T),
        in_specs=[of_queries, of_keys, of_keys, of_both, of_queries, of_each_query, of_each_query],
        out_specs=[of_all_queries, of_keys, of_keys],
        out_shape=[_like(q_BKGTE, x.shape, x.dtype) for x in (q_BKGTE, k_BKSE, v_BKSE)],
        scratch_shapes=[
            pltpu.VMEM((group, queries, width), jnp.float32),
            pltpu.VMEM((tile_S, width), jnp.float32),
            pltpu.VMEM((tile_S, width), jnp.float32),
        ],
        compiler_params=_parallel(2, 2),
        cost_estimate=_cost(5, q_BKGTE, k_BKSE, mask_BST),
        interpret=interpret,
        name="flash_attention_backward",
    )(q_BKGTE, k_BKSE, v_BKSE, mask_BST, dy_BKGTE, lse_BKGT, inner_BKGT1[..., 0])
    dk_BSKE, dv_BSKE = (jnp.swapaxes(x_BKSE, 1, 2)[:, : k_BSKE.shape[1]] for x_BKSE in of_heads)
    return _ungrouped(dq_BKGTE, q_BTHE), dk_BSKE, dv_BSKE, None


def _backward_kernel(
    q_ref, k_ref, v_ref, mask_ref, dy_ref, lse_ref, inner_ref, dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum
):
    """Adds one tile to the gradients of its keys and queries. Those of queries stay on the chip for a row."""
    tile_of_keys, tile_of_queries = pl.program_id(2), pl.program_id(3)
    is_last_of_queries = tile_of_queries == pl.num_programs(3) - 1
    tile_T, dtype = q_ref.shape[3], q_ref.dtype
    rows = pl.ds(pl.multiple_of(tile_of_queries * tile_T, tile_T), tile_T)

    @pl.when((tile_of_keys == 0) & (tile_of_queries == 0))
    def begin_row():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @pl.when(tile_of_queries == 0)
    def begin_keys():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    seen_ST = mask_ref[0].astype(jnp.float32)

    @pl.when(jnp.max(seen_ST) > 0)
    def add():
        for g in range(q_ref.shape[2]):
            q_TE, dy_TE, row = q_ref[0, 0, g], dy_ref[0, 0, g], slice(g, g + 1)
            p_ST = jnp.exp(_scores(q_TE, k_ref[0, 0], seen_ST) - lse_ref[0, 0, row]) * seen_ST
            dp_ST = _dot(v_ref[0, 0], dy_TE, 1, 1)
            ds_ST = (p_ST * (dp_ST - inner_ref[0, 0, row]) * _scale(q_TE)).astype(dtype)
            dv_sum[...] += _dot(p_ST.astype(dtype), dy_TE, 1, 0)
            dk_sum[...] += _dot(ds_ST, q_TE, 1, 0)
            dq_sum[g, rows] += _dot(ds_ST, k_ref[0, 0], 0, 0)

    @pl.when(is_last_of_queries)
    def end_keys():
        dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when((tile_of_keys == pl.num_programs(2) - 1) & is_last_of_queries)
    def end_row():
        dq_ref[0, 0] = dq_sum[...].astype(dq_ref.dtype)


flash_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q_TE, k_SE, seen_ST):
    """[S, T] float32 scores, masked by arithmetic as in `attention`."""
    return _dot(k_SE, q_TE, 1, 1) * _scale(q_TE) + (seen_ST - 1.0) * -UNSEEN


def _scale(q) -> float:
    return q.shape[-1] ** -0.5


def _dot(a, b, axis_of_a: int, axis_of_b: int):
    """The matrix product of `a` and `b` over these axes, in float32."""
    return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _tiled(q_BTHE, k_BSKE, v_BSKE, mask_BTS):
    """Pads the inputs of both kernels to full tiles. Padded queries see no key, and no query sees a padded key."""
    keys = k_BSKE.shape[1]
    k_BKSE, v_BKSE = (_padded(jnp.swapaxes(x, 1, 2), 2, keys) for x in (k_BSKE, v_BSKE))
    mask_BST = _padded(jnp.swapaxes(mask_BTS, 1, 2).astype(jnp.int8), 1, keys)
    return _grouped(q_BTHE, k_BSKE.shape[2]), k_BKSE, v_BKSE, _padded(mask_BST, 2, q_BTHE.shape[1])


def _grouped(x_BTHE, kv_heads: int):
    """[B, K, G, T + padding, E]"""
    batch, length, heads, width = x_BTHE.shape
    x_BTKGE = x_BTHE.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return _padded(jnp.einsum("btkge->bkgte", x_BTKGE), 3, length)


def _ungrouped(x_BKGTE, like_BTHE):
    """Removes the padding of `x_BKGTE`. Returns it in the shape of the queries."""
    return jnp.einsum("bkgte->btkge", x_BKGTE)[:, : like_BTHE.shape[1]].reshape(like_BTHE.shape)


def _padded(x, axis: int, length: int):
    return jnp.pad(x, [(0, -length % _LANES if at == axis else 0) for at in range(x.ndim)])


def _tile(length: int) -> int:
    """The largest tile that divides a padded length."""
    return max(tile for tile in range(_LANES, _LARGEST_TILE + 1, _LANES) if length % tile == 0)


def _like(x, shape, dtype) -> jax.ShapeDtypeStruct:
    """An abstract array that varies over the same mesh axes as `x`."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.reshape(-1)[0].astype(dtype), shape), x)


def _parallel(parallel: int, sequential: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential, vmem_limit_bytes=_VMEM
    )


def _cost(products: int, q_BKGTE, k_BKSE, mask_BST) -> pl.CostEstimate:
    """Returns the cost estimate for XLA's scheduler. Every tile counts, skipped or not."""
    scores = math.prod(q_BKGTE.shape[:-1]) * k_BKSE.shape[2]
    moved = sum(x.size * x.dtype.itemsize for x in (q_BKGTE, q_BKGTE, k_BKSE, k_BKSE, mask_BST))
    flops = 2 * products * scores * q_BKGTE.shape[-1]
    return pl.CostEstimate(flops=flops, transcendentals=scores, bytes_accessed=moved)
