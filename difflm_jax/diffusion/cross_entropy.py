"""Cross-entropy at scored positions only, in chunks: logits of all positions never exist at once."""

import functools

import jax
import jax.numpy as jnp

from difflm_jax.parallel import first_row, largest, over_vocabulary, own_rows, rows_apart, rows_together
from difflm_jax.quant import matmul


def scored_cross_entropy(
    hidden_MD: jax.Array,
    head_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    forbidden_id: int,
    chunk: int,
    vocab_size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weight * nll, nll [M], correct [M]), float32, all zero where the weight is zero.

    `forbidden_id` (the mask token) is never an output: it has no share in the softmax. Only the sum is differentiable,
    and only with respect to `hidden_MD`: the head is frozen, so the gradient of the hidden states is made together
    with the loss and the backward pass costs no product with the head. The number of chunks follows the number of
    scored positions, not M. `vocab_size` is V where `head_VD` is one device's part of the head, with padding behind it.
    """
    return _cross_entropy(chunk, forbidden_id, vocab_size or head_VD.shape[0], hidden_MD, head_VD, targets_M, weights_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(chunk, forbidden_id, vocab_size, hidden_MD, head_VD, targets_M, weights_M):
    static = (chunk, forbidden_id, vocab_size)
    outputs, _ = _in_chunks(*static, hidden_MD, head_VD, targets_M, weights_M, with_gradient=False)
    return outputs


def _forward(chunk, forbidden_id, vocab_size, hidden_MD, head_VD, targets_M, weights_M):
    static = (chunk, forbidden_id, vocab_size)
    return _in_chunks(*static, hidden_MD, head_VD, targets_M, weights_M, with_gradient=True)


def _backward(chunk, forbidden_id, vocab_size, gradient_MD, cotangents):
    return cotangents[0].astype(gradient_MD.dtype) * gradient_MD, None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _in_chunks(chunk, forbidden_id, vocab_size, hidden_MD, head_VD, targets_M, weights_M, with_gradient):
    positions = hidden_MD.shape[0]
    scored_M = weights_M != 0
    # Scored positions first; the tail is padded with an index out of range, which reads clamp and writes drop.
    order_M = jnp.argsort(~scored_M, stable=True)
    order_M = jnp.where(jnp.arange(positions) < scored_M.sum(), order_M, positions)
    order_M = jnp.pad(order_M, (0, -positions % chunk), constant_values=positions)

    # A head that is divided over devices: the chunks of all that share it are scored together, by each against its part
    # of the vocabulary.
    start, rows = first_row(head_VD), head_VD.shape[0]
    ids_V = start + jnp.arange(rows)
    is_output_V = (ids_V != forbidden_id) & (ids_V < vocab_size)

    def body(index, carry):
        nll_M, correct_M, gradient_MD = carry
        at_C = jax.lax.dynamic_slice_in_dim(order_M, index * chunk, chunk)
        hidden_CD = rows_together(hidden_MD[at_C], head_VD)
        targets_C = rows_together(targets_M[at_C], head_VD)
        logits_CV = jnp.where(is_output_V, matmul(hidden_CD, head_VD).astype(jnp.float32), -jnp.inf)
        own_largest_C = logits_CV.max(axis=-1)
        largest_C = over_vocabulary(jax.lax.pmax, own_largest_C, head_VD)
        total_C = over_vocabulary(jax.lax.psum, jnp.exp(logits_CV - largest_C[:, None]).sum(axis=-1), head_VD)
        log_total_C = jnp.log(total_C) + largest_C
        own_C = targets_C - start
        is_here_C = (own_C >= 0) & (own_C < rows)
        own_C = jnp.where(is_here_C, own_C, 0)
        target_C = jnp.take_along_axis(logits_CV, own_C[:, None], axis=-1)[:, 0]
        target_C = over_vocabulary(jax.lax.psum, jnp.where(is_here_C, target_C, 0.0), head_VD)
        chosen_C = jnp.where(own_largest_C == largest_C, start + logits_CV.argmax(axis=-1), vocab_size)
        chosen_C = over_vocabulary(jax.lax.pmin, chosen_C, head_VD)
        nll_C = own_rows(log_total_C - target_C, head_VD)
        correct_C = own_rows((chosen_C == targets_C).astype(jnp.float32), head_VD)
        nll_M = nll_M.at[at_C].set(nll_C, mode="drop")
        correct_M = correct_M.at[at_C].set(correct_C, mode="drop")
        if with_gradient:
            error_CV = jnp.exp(logits_CV - log_total_C[:, None])
            error_CV = error_CV.at[jnp.arange(len(own_C)), own_C].add(-is_here_C.astype(jnp.float32))
            error_CV = (error_CV * rows_together(weights_M[at_C], head_VD)[:, None]).astype(hidden_MD.dtype)
            gradient_CD = rows_apart(error_CV @ head_VD.astype(hidden_MD.dtype), head_VD)
            gradient_MD = gradient_MD.at[at_C].set(gradient_CD, mode="drop")
        return nll_M, correct_M, gradient_MD

    zeros_M = jnp.zeros_like(weights_M)
    carry = (zeros_M, zeros_M, jnp.zeros_like(hidden_MD))
    chunks = largest((scored_M.sum() + chunk - 1) // chunk)  # those who score together must stop together
    nll_M, correct_M, gradient_MD = jax.lax.fori_loop(0, chunks, body, carry)
    return ((weights_M * nll_M).sum(), nll_M, correct_M), gradient_MD
