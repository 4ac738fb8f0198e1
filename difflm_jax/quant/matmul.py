"""Products of activations with weights: frozen ones, dense or quantised, and trained factors.

Sums are made in float32 and rounded once, in the forward and in the backward pass. That needs gradients of our own: by
jax's rule a float32 sum has a float32 gradient, and the products behind it are no longer of bfloat16 numbers. XLA's CPU
backend uses a processor's matrix unit for bfloat16 only where the sum is asked for in float32: on a Xeon with AMX it is
four to five times as fast as otherwise, and as float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from difflm_jax.bits import floats_of
from difflm_jax.parallel import varying_with
from difflm_jax.quant.qtensor import QTensor, dequantize, own_scales


def matmul(x: jax.Array, w: jax.Array | QTensor, dtype: Any = None) -> jax.Array:
    """`x` [..., in] times the frozen `w` [out, in] -> [..., out] in `dtype`, that of `x` by default.

    Weights keep Hugging Face's [out, in] order: the contraction is over the last axis of both, which costs nothing
    against [in, out] (measured on CPU), and neither import nor export transposes. `w` passes the gradient to `x` and
    has none itself. It may come as `difflm_jax.bits`.
    """
    w = own_scales(w) if isinstance(w, QTensor) else w
    rows = _rows(varying_with(x, w))
    return _frozen_product(jnp.dtype(dtype or x.dtype), x.dtype, rows, w).reshape(*x.shape[:-1], w.shape[0])


def trained_matmul(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` [..., in] times a trained `factor` [out, in] -> [..., out] in the dtype of `x`.

    The factor takes part in the dtype of `x`; its gradient is in its own, float32 for a master.
    """
    rows = _rows(varying_with(x, factor))
    return _trained_product(rows, varying_with(factor, x)).reshape(*x.shape[:-1], factor.shape[0])


def _rows(x: jax.Array) -> jax.Array:
    # Two-dimensional, so that its transpose is too: XLA's CPU backend copies a three-dimensional operand of a gradient
    # into another order first, which made a LoRA step 1.4 times slower.
    return x.reshape(-1, x.shape[-1])


def summed_product(a: jax.Array, b: jax.Array, over: tuple[int, int], dtype: Any) -> jax.Array:
    """The product of two matrices over axis `over[0]` of `a` and `over[1]` of `b`, summed in float32, in `dtype`."""
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_product(dtype: Any, given_dtype: Any, rows: jax.Array, w: jax.Array | QTensor) -> jax.Array:
    return summed_product(rows, _dense(w, given_dtype), (1, 1), dtype)


def _frozen_forward(dtype, given_dtype, rows, w):
    return _frozen_product(dtype, given_dtype, rows, w), w


def _frozen_backward(dtype, given_dtype, w, gradient):
    # A quantised weight is decoded once more: keeping the decoded one would hold the model in full.
    return summed_product(gradient.astype(given_dtype), _dense(w, given_dtype), (1, 0), given_dtype), None


_frozen_product.defvjp(_frozen_forward, _frozen_backward)


@jax.custom_vjp
def _trained_product(rows: jax.Array, factor: jax.Array) -> jax.Array:
    return summed_product(rows, factor.astype(rows.dtype), (1, 1), rows.dtype)


def _trained_forward(rows, factor):
    return _trained_product(rows, factor), (rows, factor)


def _trained_backward(saved, gradient):
    rows, factor = saved
    of_rows = summed_product(gradient, factor.astype(rows.dtype), (1, 0), rows.dtype)
    return of_rows, summed_product(gradient, rows, (0, 0), factor.dtype)


_trained_product.defvjp(_trained_forward, _trained_backward)


def _dense(w: jax.Array | QTensor, dtype: Any) -> jax.Array:
    w = floats_of(w)
    if not isinstance(w, QTensor):
        return w.astype(dtype)
    # Left to itself XLA turns the codes of all layers into the order that decoding likes best, in a copy of the whole
    # stack before the loop over layers: on a TPU v6e 1.7 GiB more for Qwen3-4B.
    w = jax.lax.optimization_barrier(w)
    codes = with_layout_constraint(w.codes, Layout(tuple(range(w.codes.ndim))))
    return dequantize(w.replace(codes=codes), dtype)
