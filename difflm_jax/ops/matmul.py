"""Matrix products of activations with weights: dense or quantised, frozen or trained.

Sums are computed in float32 and rounded once, in the forward and in the backward pass. This needs custom gradients:
under jax's rule a float32 sum has a float32 gradient, so the backward matmuls would not take bfloat16 operands. The
output dtype requested from the backend is chosen at lowering (`summed_product`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from difflm_jax.distributed.collectives import varying_with
from difflm_jax.ops import few_rows
from difflm_jax.ops.cpu import floats_of
from difflm_jax.ops.few_rows import InStack
from difflm_jax.ops.gradients import is_differentiated, values
from difflm_jax.quant.qtensor import QTensor, dequantize, own_scales


def matmul(x: jax.Array, w: jax.Array | QTensor | InStack, dtype: Any = None) -> jax.Array:
    """Multiplies `x` [..., in] by `w` [out, in] -> [..., out] in `dtype`, by default that of `x`.

    Weights keep Hugging Face's [out, in] order, so import and export need no transpose. Contracting the last axis of
    both costs no more than [in, out] (measured on CPU). `w` is cast to the dtype of `x`. It has a gradient, in its own
    dtype, if it is differentiated (a LoRA factor, a fully trained weight). A frozen weight costs neither that matmul
    nor the memory for `x`, and may be quantised or stored as `ops.cpu` bits. An `InStack` weight has no gradient.
    """
    if isinstance(w, InStack):
        return few_rows.product(_rows(x), w, dtype or x.dtype).reshape(*x.shape[:-1], w.shape[0])
    w = own_scales(w) if isinstance(w, QTensor) else varying_with(w, x)
    rows = _rows(varying_with(x, w))
    return _product(jnp.dtype(dtype or x.dtype), x.dtype, rows, w).reshape(*x.shape[:-1], w.shape[0])


def _rows(x: jax.Array) -> jax.Array:
    # Two-dimensional, so that its transpose is too. XLA's CPU backend first copies a three-dimensional operand of a
    # gradient into another layout, which made a LoRA step 1.4 times slower.
    return x.reshape(-1, x.shape[-1])


def summed_product(a: jax.Array, b: jax.Array, over: tuple[int, int], dtype: Any) -> jax.Array:
    """Contracts axis `over[0]` of matrix `a` with `over[1]` of `b`. Sums in float32 and returns `dtype`.

    XLA's CPU backend uses the matrix unit for bfloat16 (AMX) only for a float32 result, which is four to five times as
    fast. GPUs always sum in float32 but write the requested dtype: 0.90 ms in float32 and 0.76 in bfloat16 for a matmul
    of a Qwen3-4B layer on an H200. Only the branch of the current platform is compiled.
    """
    product = functools.partial(_dot, over)
    if jnp.dtype(dtype) == jnp.float32:
        return product(jnp.float32, a, b)
    wide = functools.partial(product, jnp.float32)
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: wide(a, b).astype(dtype), default=functools.partial(product, dtype)
    )


def _dot(over: tuple[int, int], dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dtype: Any, given_dtype: Any, rows: jax.Array, w: jax.Array | QTensor) -> jax.Array:
    return summed_product(rows, dense(w, given_dtype), (1, 1), dtype)


def _forward(dtype, given_dtype, rows, w):
    is_trained = is_differentiated(w)
    rows, w = values(rows, w)
    return _product(dtype, given_dtype, rows, w), (rows if is_trained else None, w)


def _backward(dtype, given_dtype, saved, gradient):
    rows, w = saved
    gradient = gradient.astype(given_dtype)
    # A quantised weight is decoded again: saving the decoded ones would store the whole model in full precision.
    of_rows = summed_product(gradient, dense(w, given_dtype), (1, 0), given_dtype)
    return of_rows, None if rows is None else summed_product(gradient, rows, (0, 0), w.dtype)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def dense(w: jax.Array | QTensor, dtype: Any) -> jax.Array:
    """Returns a weight as an array of `dtype`, decoded if it is quantised."""
    w = floats_of(w)
    if not isinstance(w, QTensor):
        return w.astype(dtype)
    # Without a constraint, XLA copies the whole stack of codes into its preferred layout before the loop over layers:
    # on a TPU v6e that takes 1.7 GiB more for Qwen3-4B.
    w = jax.lax.optimization_barrier(w)
    codes = with_layout_constraint(w.codes, Layout(tuple(range(w.codes.ndim))))
    return dequantize(w.replace(codes=codes), dtype)
