"""Cross-entropy at scored positions only, in chunks: logits of all positions are never in memory at once."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.distributed.collectives import first_row, largest, over_vocabulary, own_rows, rows_apart, rows_together
from difflm_jax.ops.gradients import is_differentiated, values
from difflm_jax.ops.matmul import matmul, summed_product


@struct.dataclass
class Teacher:
    """A second distribution at every position: that of the same head for other hidden states."""

    hidden: jax.Array  # [M, D]
    weights: jax.Array  # [M] float32, weight of the KL divergence at each position


class Scores(NamedTuple):
    """Scores of each position [M], float32 but for `choice`; zero where both weights are zero."""

    nll: jax.Array  # -log p of the target, nats
    correct: jax.Array  # 1 where the target is the most likely token
    confidence: jax.Array  # log p of the most likely token
    divergence: jax.Array  # KL(teacher || model), nats; zero without a teacher
    choice: jax.Array  # int32, the most likely token


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Which rows of the head are outputs, and how logits are capped.

    forbidden_id: never an output (the mask token); it has probability 0, also for a teacher.
    vocab_size: V, if `head_VD` is one device's shard of the head, padded at the end. None: all rows of the head.
    softcap: see `capped`; None: logits are not capped.
    """

    forbidden_id: int
    vocab_size: int | None = None
    softcap: float | None = None


def scored_cross_entropy(
    hidden_MD: jax.Array,
    head_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    outputs: Outputs,
    chunk: int,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, Scores]:
    """Returns (sum of weight * nll + teacher's weight * KL(teacher || model), `Scores`).

    Only the sum is differentiable, with respect to `hidden_MD` and, if it is trained, `head_VD`. Both gradients are
    computed together with the loss, so the backward pass needs no matmul with the head. A frozen head has no gradient.
    The number of chunks depends on the number of scored positions, not on M.
    """
    # Chunks are padded to full size, so a chunk larger than all positions would only multiply padding.
    static = (
        min(chunk, hidden_MD.shape[0]),
        (outputs.forbidden_id, outputs.vocab_size or head_VD.shape[0], outputs.softcap),
    )
    return _cross_entropy(*static, hidden_MD, head_VD, targets_M, weights_M, teacher)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(chunk, outputs, hidden_MD, head_VD, targets_M, weights_M, teacher):
    head = _Head(head_VD, hidden_MD.dtype, *outputs)
    found, _ = _in_chunks(chunk, head, hidden_MD, targets_M, weights_M, teacher, Gradients(None, None))
    return found


def _forward(chunk, outputs, hidden_MD, head_VD, *others):
    head_is_trained = is_differentiated(head_VD)
    hidden_MD, head_VD, *others = values(hidden_MD, head_VD, *others)
    zeros = Gradients(jnp.zeros_like(hidden_MD), jnp.zeros_like(head_VD) if head_is_trained else None)
    head = _Head(head_VD, hidden_MD.dtype, *outputs)
    return _in_chunks(chunk, head, hidden_MD, *others, zeros)


def _backward(chunk, outputs, gradients, cotangents):
    of_loss = cotangents[0]
    of_hidden_MD, of_head_VD = jax.tree.map(lambda gradient: of_loss.astype(gradient.dtype) * gradient, gradients)
    return of_hidden_MD, of_head_VD, None, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


class Gradients(NamedTuple):
    """Gradients of the sum with respect to the hidden states and the head; None: not computed."""

    hidden: jax.Array | None  # [M, D]
    head: jax.Array | None  # [V, D]


class _Head:
    """The output head or one device's shard of it, in the dtype of the hidden states.

    Devices that share a head score all their chunks together, each for its part of the vocabulary.
    """

    def __init__(
        self, head_VD: jax.Array, dtype: Any, forbidden_id: int, vocab_size: int, softcap: float | None = None
    ):
        self.weight_VD, self.vocab_size, self.softcap = head_VD.astype(dtype), vocab_size, softcap
        self.start, self.rows = first_row(head_VD), head_VD.shape[0]
        ids_V = self.start + jnp.arange(self.rows)
        self.is_output_V = (ids_V != forbidden_id) & (ids_V < vocab_size)

    def together(self, x_C: jax.Array) -> jax.Array:
        """Concatenates the chunks of all devices that share the head."""
        return rows_together(x_C, self.weight_VD)

    def over_all(self, reduce: Any, x_C: jax.Array) -> jax.Array:
        return over_vocabulary(reduce, x_C, self.weight_VD)

    def logits(self, hidden_CD: jax.Array) -> jax.Array:
        """float32 [C, V] logits of this part of the vocabulary; -inf for rows that are not outputs."""
        logits_CV = capped(matmul(hidden_CD, self.weight_VD, jnp.float32), self.softcap)
        return jnp.where(self.is_output_V, logits_CV, -jnp.inf)

    def through_cap(self, error_CV: jax.Array, logits_CV: jax.Array) -> jax.Array:
        """Returns the gradient of the uncapped logits, from that of the capped ones."""
        if self.softcap is None:
            return error_CV
        return error_CV * jnp.where(self.is_output_V, 1.0 - jnp.square(logits_CV / self.softcap), 0.0)

    def normalised(self, logits_CV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (largest logit [C], exp(logit - largest) [C, V], their sum [C]), over the whole vocabulary."""
        largest_C = self.over_all(jax.lax.pmax, logits_CV.max(axis=-1))
        powers_CV = jnp.exp(logits_CV - largest_C[:, None])
        return largest_C, powers_CV, self.over_all(jax.lax.psum, powers_CV.sum(axis=-1))

    def place_of(self, tokens_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (whether the token is in this part, its row there or 0), [C] each."""
        own_C = tokens_C - self.start
        is_here_C = (own_C >= 0) & (own_C < self.rows)
        return is_here_C, jnp.where(is_here_C, own_C, 0)


def _in_chunks(chunk, head: _Head, hidden_MD, targets_M, weights_M, teacher: Teacher | None, zeros: Gradients):
    """Returns ((the sum, scores), gradients), the latter for those of which `zeros` are given."""
    positions = hidden_MD.shape[0]
    scored_M = weights_M != 0
    if teacher is not None:
        scored_M |= teacher.weights != 0
    # Scored positions first; the tail is padded with an index out of range, which reads clamp and writes drop.
    order_M = jnp.argsort(~scored_M, stable=True)
    order_M = jnp.where(jnp.arange(positions) < scored_M.sum(), order_M, positions)
    order_M = jnp.pad(order_M, (0, -positions % chunk), constant_values=positions)

    def body(index, carry):
        scores, gradients = carry
        at_C = jax.lax.dynamic_slice_in_dim(order_M, index * chunk, chunk)
        # With at most one chunk, XLA would hoist the gathers out of the loop and change the order of collectives.
        at_C, _ = jax.lax.optimization_barrier((at_C, index))

        def weights_at(x_M: jax.Array) -> jax.Array:
            return head.together(jnp.where(at_C < positions, x_M[at_C], 0))

        hidden_CD, targets_C = head.together(hidden_MD[at_C]), head.together(targets_M[at_C])
        logits_CV = head.logits(hidden_CD)
        largest_C, powers_CV, total_C = head.normalised(logits_CV)
        log_total_C = largest_C + jnp.log(total_C)
        is_here_C, row_C = head.place_of(targets_C)
        target_C = jnp.where(is_here_C, jnp.take_along_axis(logits_CV, row_C[:, None], axis=-1)[:, 0], 0.0)
        target_C = head.over_all(jax.lax.psum, target_C) - log_total_C
        is_best_C = logits_CV.max(axis=-1) == largest_C
        chosen_C = jnp.where(is_best_C, head.start + logits_CV.argmax(axis=-1), head.vocab_size)
        chosen_C = head.over_all(jax.lax.pmin, chosen_C)
        divergence_C = jnp.zeros_like(target_C)
        if teacher is not None:
            teacher_CV = head.logits(head.together(teacher.hidden[at_C]))
            teacher_largest_C, q_CV, teacher_total_C = head.normalised(teacher_CV)
            q_CV = q_CV / teacher_total_C[:, None]
            # log q - log p, for outputs only: the others have a logit of -inf in both
            ratio_CV = jnp.where(head.is_output_V, teacher_CV - logits_CV, 0.0)
            divergence_C = head.over_all(jax.lax.psum, (q_CV * ratio_CV).sum(axis=-1))
            divergence_C += log_total_C - (teacher_largest_C + jnp.log(teacher_total_C))
        correct_C = (chosen_C == targets_C).astype(jnp.float32)
        found = (-target_C, correct_C, -jnp.log(total_C), divergence_C, chosen_C)
        found = [own_rows(x_C, head.weight_VD) for x_C in found]
        scores = Scores(*(x_M.at[at_C].set(x_C, mode="drop") for x_M, x_C in zip(scores, found, strict=True)))
        if gradients.hidden is not None:
            # weight * (p - onehot) for weight * nll, weight * (p - q) for the divergence
            p_CV, weights_C = powers_CV / total_C[:, None], weights_at(weights_M)
            error_CV = p_CV * weights_C[:, None]
            error_CV = error_CV.at[jnp.arange(len(row_C)), row_C].add(-jnp.where(is_here_C, weights_C, 0.0))
            if teacher is not None:
                error_CV += weights_at(teacher.weights)[:, None] * (p_CV - q_CV)
            error_CV = head.through_cap(error_CV, logits_CV)
            gradients = _added(gradients, at_C, error_CV.astype(hidden_MD.dtype), hidden_CD, head.weight_VD)
        return scores, gradients

    zeros_M = jnp.zeros_like(weights_M)
    # Devices sharing the head must run equally many chunks. The trip count depends on the hidden states, which fixes
    # the order of collectives on CPU: XLA starts each once its operands are ready. With NaN states, all are scored.
    count = jnp.where(jnp.isnan(hidden_MD[0, 0]), positions, scored_M.sum())
    chunks = largest((count + chunk - 1) // chunk)
    start_of_all = (Scores(*[zeros_M] * 4, jnp.zeros_like(targets_M)), zeros)
    scores, gradients = jax.lax.fori_loop(0, chunks, body, start_of_all)
    loss = (weights_M * scores.nll).sum()
    if teacher is not None:
        loss += (teacher.weights * scores.divergence).sum()
    return (loss, scores), gradients


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """c tanh(x / c) for a cap c (arXiv:2408.00118); the logits themselves without one."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _added(gradients: Gradients, at_C, error_CV, hidden_CD, head_VD) -> Gradients:
    """Adds the gradients of a chunk to `gradients`; `error_CV` is the gradient of its logits."""
    of_hidden_CD = summed_product(error_CV, head_VD, (1, 0), error_CV.dtype)
    of_hidden_MD = gradients.hidden.at[at_C].set(rows_apart(of_hidden_CD, head_VD), mode="drop")
    if gradients.head is None:
        return Gradients(of_hidden_MD, None)
    of_head_VD = summed_product(error_CV, hidden_CD, (0, 0), gradients.head.dtype)
    return Gradients(of_hidden_MD, gradients.head + of_head_VD)
