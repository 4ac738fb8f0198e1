"""Cross-entropy at scored positions only, in chunks: logits of all positions never exist at once."""

import functools

import jax
import jax.numpy as jnp

from difflm_jax.quant import matmul


def scored_cross_entropy(
    hidden_MD: jax.Array,
    head_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    forbidden_id: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weight * nll, nll [M], correct [M]), float32, all zero where the weight is zero.

    `forbidden_id` (the mask token) is never an output: it has no share in the softmax. Only the sum is differentiable,
    and only with respect to `hidden_MD`: the head is frozen, so the gradient of the hidden states is made together
    with the loss and the backward pass costs no product with the head. The number of chunks follows the number of
    scored positions, not M.
    """
    return _cross_entropy(chunk, forbidden_id, hidden_MD, head_VD, targets_M, weights_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(chunk, forbidden_id, hidden_MD, head_VD, targets_M, weights_M):
    outputs, _ = _in_chunks(chunk, forbidden_id, hidden_MD, head_VD, targets_M, weights_M, with_gradient=False)
    return outputs


def _forward(chunk, forbidden_id, hidden_MD, head_VD, targets_M, weights_M):
    return _in_chunks(chunk, forbidden_id, hidden_MD, head_VD, targets_M, weights_M, with_gradient=True)


def _backward(chunk, forbidden_id, gradient_MD, cotangents):
    return cotangents[0].astype(gradient_MD.dtype) * gradient_MD, None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _in_chunks(chunk, forbidden_id, hidden_MD, head_VD, targets_M, weights_M, with_gradient):
    positions = hidden_MD.shape[0]
    scored_M = weights_M != 0
    # Scored positions first; the tail is padded with an index out of range, which reads clamp and writes drop.
    order_M = jnp.argsort(~scored_M, stable=True)
    order_M = jnp.where(jnp.arange(positions) < scored_M.sum(), order_M, positions)
    order_M = jnp.pad(order_M, (0, -positions % chunk), constant_values=positions)

    def body(index, carry):
        nll_M, correct_M, gradient_MD = carry
        at_C = jax.lax.dynamic_slice_in_dim(order_M, index * chunk, chunk)
        hidden_CD = hidden_MD[at_C]
        logits_CV = matmul(hidden_CD, head_VD).astype(jnp.float32).at[:, forbidden_id].set(-jnp.inf)
        targets_C = targets_M[at_C]
        log_total_C = jax.nn.logsumexp(logits_CV, axis=-1)
        nll_C = log_total_C - jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        nll_M = nll_M.at[at_C].set(nll_C, mode="drop")
        correct_M = correct_M.at[at_C].set((logits_CV.argmax(-1) == targets_C).astype(jnp.float32), mode="drop")
        if with_gradient:
            error_CV = jnp.exp(logits_CV - log_total_C[:, None]).at[jnp.arange(chunk), targets_C].add(-1.0)
            error_CV = (error_CV * weights_M[at_C][:, None]).astype(hidden_MD.dtype)
            gradient_CD = error_CV @ head_VD.astype(hidden_MD.dtype)
            gradient_MD = gradient_MD.at[at_C].set(gradient_CD, mode="drop")
        return nll_M, correct_M, gradient_MD

    zeros_M = jnp.zeros_like(weights_M)
    start = (zeros_M, zeros_M, jnp.zeros_like(hidden_MD))
    chunks = (scored_M.sum() + chunk - 1) // chunk
    nll_M, correct_M, gradient_MD = jax.lax.fori_loop(0, chunks, body, start)
    return ((weights_M * nll_M).sum(), nll_M, correct_M), gradient_MD
