"""The one product of activations with a frozen weight; a quantised format is one more branch here and nowhere else."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x` [..., in] times `w` [out, in] -> [..., out] in the dtype of `x`.

    Weights keep Hugging Face's [out, in] order: the contraction is over the last axis of both, which costs nothing
    against [in, out] (measured on CPU), and neither import nor export transposes.
    """
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), contract).astype(jnp.result_type(x))
