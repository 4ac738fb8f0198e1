"""The one product of activations with a frozen weight, dense or quantised."""

from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from difflm_jax.parallel import varying_with
from difflm_jax.quant.qtensor import QTensor, dequantize, own_scales


def matmul(x: jax.Array, w: jax.Array | QTensor) -> jax.Array:
    """`x` [..., in] times `w` [out, in] -> [..., out] in the dtype of `x`.

    Weights keep Hugging Face's [out, in] order: the contraction is over the last axis of both, which costs nothing
    against [in, out] (measured on CPU), and neither import nor export transposes. A quantised weight passes the
    gradient to `x` and has none itself.
    """
    # Two-dimensional, so that its transpose is too: XLA's CPU backend copies a three-dimensional operand of a gradient
    # into another order first, which made a LoRA step 1.4 times slower.
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, QTensor):
        w = own_scales(w)
        product = _quantised_product(varying_with(rows, w), w)
    else:
        product = _product(rows, w.astype(x.dtype))
    return product.reshape(*x.shape[:-1], w.shape[0])


def _product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())))


@jax.custom_vjp
def _quantised_product(rows: jax.Array, w: QTensor) -> jax.Array:
    return _product(rows, _decoded(w, rows.dtype))


def _forward(rows: jax.Array, w: QTensor) -> tuple[jax.Array, QTensor]:
    return _quantised_product(rows, w), w


def _backward(w: QTensor, gradient: jax.Array) -> tuple[jax.Array, None]:
    # The weight is decoded once more: keeping the decoded one for the backward pass would hold the model in full.
    return gradient @ _decoded(w, gradient.dtype), None


def _decoded(w: QTensor, dtype: Any) -> jax.Array:
    # Left to itself XLA turns the codes of all layers into the order that decoding likes best, in a copy of the whole
    # stack before the loop over layers: on a TPU v6e 1.7 GiB more for Qwen3-4B.
    codes = with_layout_constraint(w.codes, Layout(tuple(range(w.codes.ndim))))
    return dequantize(w.replace(codes=codes), dtype)


_quantised_product.defvjp(_forward, _backward)
