"""Cross-entropy at scored positions only, in chunks: logits of all positions never exist at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.parallel import first_row, largest, over_vocabulary, own_rows, rows_apart, rows_together
from difflm_jax.quant import matmul, summed_product


@struct.dataclass
class Teacher:
    """A second distribution over the vocabulary at every position, that of the same head over other hidden states."""

    hidden: jax.Array  # [M, D]
    weights: jax.Array  # [M] float32, of the KL divergence at each position


class Scores(NamedTuple):
    """What is known of each scored position, [M], float32 but for the last; zero where both weights are zero."""

    nll: jax.Array  # -log p of the target, nats
    correct: jax.Array  # 1 where the target is the likeliest token
    confidence: jax.Array  # log p of the likeliest token
    divergence: jax.Array  # KL(teacher || model), nats; zero without a teacher
    choice: jax.Array  # int32, the likeliest token


def scored_cross_entropy(
    hidden_MD: jax.Array,
    head_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    forbidden_id: int,
    chunk: int,
    vocab_size: int | None = None,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, Scores]:
    """(sum of weight * nll + teacher's weight * KL(teacher || model), `Scores`).

    `forbidden_id` (the mask token) is never an output: it has no share in the softmax, nor in the teacher's. Only the
    sum is differentiable, and only with respect to `hidden_MD`: the head is frozen, so the gradient of the hidden
    states is made together with the loss and the backward pass costs no product with the head. The number of chunks
    follows the number of scored positions, not M. `vocab_size` is V where `head_VD` is one device's part of the head,
    with padding behind it.
    """
    static = (chunk, forbidden_id, vocab_size or head_VD.shape[0])
    return _cross_entropy(*static, hidden_MD, head_VD, targets_M, weights_M, teacher)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(chunk, forbidden_id, vocab_size, hidden_MD, head_VD, targets_M, weights_M, teacher):
    static = (chunk, forbidden_id, vocab_size)
    outputs, _ = _in_chunks(*static, hidden_MD, head_VD, targets_M, weights_M, teacher, with_gradient=False)
    return outputs


def _forward(chunk, forbidden_id, vocab_size, hidden_MD, head_VD, targets_M, weights_M, teacher):
    static = (chunk, forbidden_id, vocab_size)
    return _in_chunks(*static, hidden_MD, head_VD, targets_M, weights_M, teacher, with_gradient=True)


def _backward(chunk, forbidden_id, vocab_size, gradient_MD, cotangents):
    return cotangents[0].astype(gradient_MD.dtype) * gradient_MD, None, None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _in_chunks(chunk, forbidden_id, vocab_size, hidden_MD, head_VD, targets_M, weights_M, teacher, with_gradient):
    positions = hidden_MD.shape[0]
    scored_M = weights_M != 0
    if teacher is not None:
        scored_M |= teacher.weights != 0
    # Scored positions first; the tail is padded with an index out of range, which reads clamp and writes drop.
    order_M = jnp.argsort(~scored_M, stable=True)
    order_M = jnp.where(jnp.arange(positions) < scored_M.sum(), order_M, positions)
    order_M = jnp.pad(order_M, (0, -positions % chunk), constant_values=positions)

    # A head that is divided over devices: the chunks of all that share it are scored together, by each against its part
    # of the vocabulary.
    start, rows = first_row(head_VD), head_VD.shape[0]
    ids_V = start + jnp.arange(rows)
    is_output_V = (ids_V != forbidden_id) & (ids_V < vocab_size)

    def together(x_M: jax.Array, at_C: jax.Array) -> jax.Array:
        return rows_together(x_M[at_C], head_VD)

    def logits_of(hidden_MD: jax.Array, at_C: jax.Array) -> jax.Array:
        """[C, V] of this part of the vocabulary."""
        logits_CV = matmul(together(hidden_MD, at_C), head_VD, jnp.float32)
        return jnp.where(is_output_V, logits_CV, -jnp.inf)

    def normalised(logits_CV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(the largest logit [C], exp(logit - largest) [C, V], their sum [C]), over the whole vocabulary."""
        largest_C = over_vocabulary(jax.lax.pmax, logits_CV.max(axis=-1), head_VD)
        powers_CV = jnp.exp(logits_CV - largest_C[:, None])
        return largest_C, powers_CV, over_vocabulary(jax.lax.psum, powers_CV.sum(axis=-1), head_VD)

    def body(index, carry):
        scores, gradient_MD = carry
        at_C = jax.lax.dynamic_slice_in_dim(order_M, index * chunk, chunk)
        # Where there is one chunk at most, XLA would take what it gathers out of the loop, and so out of its turn.
        at_C, _ = jax.lax.optimization_barrier((at_C, index))
        logits_CV = logits_of(hidden_MD, at_C)
        largest_C, powers_CV, total_C = normalised(logits_CV)
        log_total_C = largest_C + jnp.log(total_C)
        targets_C = together(targets_M, at_C)
        own_C = targets_C - start
        is_here_C = (own_C >= 0) & (own_C < rows)
        own_C = jnp.where(is_here_C, own_C, 0)
        target_C = jnp.where(is_here_C, jnp.take_along_axis(logits_CV, own_C[:, None], axis=-1)[:, 0], 0.0)
        target_C = over_vocabulary(jax.lax.psum, target_C, head_VD) - log_total_C
        is_best_C = logits_CV.max(axis=-1) == largest_C
        chosen_C = jnp.where(is_best_C, start + logits_CV.argmax(axis=-1), vocab_size)
        chosen_C = over_vocabulary(jax.lax.pmin, chosen_C, head_VD)
        divergence_C = jnp.zeros_like(target_C)
        if teacher is not None:
            teacher_CV = logits_of(teacher.hidden, at_C)
            teacher_largest_C, q_CV, teacher_total_C = normalised(teacher_CV)
            q_CV = q_CV / teacher_total_C[:, None]
            # log q - log p, of outputs alone: what is none has a logit of -inf in both
            ratio_CV = jnp.where(is_output_V, teacher_CV - logits_CV, 0.0)
            divergence_C = over_vocabulary(jax.lax.psum, (q_CV * ratio_CV).sum(axis=-1), head_VD)
            divergence_C += log_total_C - (teacher_largest_C + jnp.log(teacher_total_C))
        correct_C = (chosen_C == targets_C).astype(jnp.float32)
        found = (-target_C, correct_C, -jnp.log(total_C), divergence_C, chosen_C)
        scores = Scores(
            *(all_M.at[at_C].set(own_rows(x_C, head_VD), mode="drop") for all_M, x_C in zip(scores, found, strict=True))
        )
        if with_gradient:
            # of weight * nll it is weight * (p - onehot), of the divergence weight * (p - q)
            p_CV, weights_C = powers_CV / total_C[:, None], together(weights_M, at_C)
            error_CV = p_CV * weights_C[:, None]
            error_CV = error_CV.at[jnp.arange(len(own_C)), own_C].add(-jnp.where(is_here_C, weights_C, 0.0))
            if teacher is not None:
                error_CV += together(teacher.weights, at_C)[:, None] * (p_CV - q_CV)
            dtype = hidden_MD.dtype
            gradient_CD = summed_product(error_CV.astype(dtype), head_VD.astype(dtype), (1, 0), dtype)
            gradient_CD = rows_apart(gradient_CD, head_VD)
            gradient_MD = gradient_MD.at[at_C].set(gradient_CD, mode="drop")
        return scores, gradient_MD

    zeros_M = jnp.zeros_like(weights_M)
    # Those who score together must stop together. To agree on it they wait for the hidden states: XLA's CPU backend
    # starts what devices exchange as soon as its operands are there, so that between processes the order must follow
    # from data. (Of states that are not numbers all are scored.)
    count = jnp.where(jnp.isnan(hidden_MD[0, 0]), positions, scored_M.sum())
    chunks = largest((count + chunk - 1) // chunk)
    start_of_all = (Scores(*[zeros_M] * 4, jnp.zeros_like(targets_M)), jnp.zeros_like(hidden_MD))
    scores, gradient_MD = jax.lax.fori_loop(0, chunks, body, start_of_all)
    loss = (weights_M * scores.nll).sum()
    if teacher is not None:
        loss += (teacher.weights * scores.divergence).sum()
    return (loss, scores), gradient_MD
