"""The loss of a corrupted batch, as sums. The caller adds those of all devices and divides."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import DROPOUT_STREAM, CleanBatch, Corruption, NoisyBatch, corrupt
from difflm_jax.diffusion.extras.annealing import annealed, grown
from difflm_jax.diffusion.extras.complementary import paired
from difflm_jax.diffusion.extras.distillation import teacher_of
from difflm_jax.diffusion.extras.on_policy import on_policy
from difflm_jax.diffusion.extras.step import Step
from difflm_jax.diffusion.lossless import draft_sums
from difflm_jax.diffusion.segments import work_of_examples
from difflm_jax.models.flops import Work
from difflm_jax.models.transformer import Transformer, head_weight
from difflm_jax.ops.cross_entropy import Outputs, Scores, Teacher, scored_cross_entropy
from difflm_jax.ops.random import fold_seeds, token_seeds

RATE_BUCKETS = 5  # mask rates are reported in [0, 0.2), [0.2, 0.4), ... [0.8, 1]


@struct.dataclass
class LossSums:
    """Sums over the positions of a batch, all float32. Adding two `LossSums` gives those of both batches."""

    loss: jax.Array  # [] sum of weight * cross-entropy, plus the teacher's part
    weight: jax.Array  # [] sum of weights
    masked_nll: jax.Array  # [RATE_BUCKETS] nats, of hidden tokens by the mask rate of their draw
    masked_correct: jax.Array  # [RATE_BUCKETS]
    masked_count: jax.Array  # [RATE_BUCKETS]
    tokens: jax.Array  # [] real tokens
    work: Work | None = None  # of the pass with a gradient, without padding
    frozen_work: Work | None = None  # of the frozen base's pass without gradient (teacher or clean copy)
    expert_tokens: jax.Array | None = None  # [layers with experts, X] real tokens routed to each expert


def loss_sums(
    model: Transformer,
    variables: dict[str, Any],
    batch: CleanBatch,
    key: jax.Array,
    corruption: Corruption,
    chunk: int,
    train: bool,
    index: jax.Array | int = 0,
) -> tuple[jax.Array, LossSums]:
    """Returns (the loss as a sum, all sums). The loss is differentiable in the float32 collections of `variables`.

    key: the key of the step. chunk: positions whose logits exist at once. train: turns dropout on. index: number of the
    step, for rules that change during training.
    """
    if corruption.draft is not None:
        loss, sums = draft_sums(model, corruption, variables, batch, key, chunk, train, index)
        return loss, LossSums(**sums)
    corruption = grown(corruption, index)
    score = functools.partial(_score, model, corruption, chunk)

    def seeds(stream: int, positions_BL: jax.Array = batch.positions) -> jax.Array:
        return token_seeds(jax.random.fold_in(key, stream), batch.example_ids, positions_BL)

    def example_seeds(stream: int) -> jax.Array:
        return seeds(stream, jnp.zeros_like(batch.positions))

    def own_scores(noisy: NoisyBatch, weights_BL: jax.Array) -> tuple[jax.Array, Scores]:
        return score(jax.lax.stop_gradient(variables), None, noisy.replace(dropout_seeds=None), weights_BL)[:2]

    noisy = corrupt(key, batch, corruption).replace(dropout_seeds=seeds(DROPOUT_STREAM) if train else None)
    for extra in (annealed, paired, on_policy):
        noisy = extra(noisy, Step(corruption, index, seeds, example_seeds, own_scores))
    distilled = corruption.extras.distillation
    teacher = teacher_of(model, corruption.diffusion, variables["params"], noisy) if distilled else None
    loss, scores, chosen = score(variables, teacher, noisy, noisy.weights)

    counted_BL = noisy.masked & (noisy.weights != 0)
    bucket_BL = jnp.minimum((noisy.rates * RATE_BUCKETS).astype(jnp.int32), RATE_BUCKETS - 1)

    def by_rate(values_BL: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(_flat(counted_BL * values_BL), _flat(bucket_BL), num_segments=RATE_BUCKETS)

    return loss, LossSums(
        loss=jax.lax.stop_gradient(loss),
        weight=noisy.counts.sum(),
        masked_nll=by_rate(scores.nll),
        masked_correct=by_rate(scores.correct),
        masked_count=by_rate(jnp.ones(noisy.tokens.shape)),
        tokens=(batch.segments != 0).sum().astype(jnp.float32),
        work=_work(batch, noisy, corruption.diffusion),
        frozen_work=jax.tree.map(lambda x: bool(distilled) * x, _teacher_work(batch, noisy)),
        expert_tokens=None if chosen is None else _tokens_of_experts(chosen, noisy, model.config.experts.count),
    )


def _tokens_of_experts(chosen_NBTK: jax.Array, noisy: NoisyBatch, count: int) -> jax.Array:
    """Returns float32 [N, X]: real tokens routed to each expert."""
    real_BL = (noisy.segments != 0).astype(jnp.float32)
    copies = chosen_NBTK.shape[2] // real_BL.shape[1]
    weights_BTK = jnp.broadcast_to(jnp.tile(real_BL, (1, copies))[:, :, None], chosen_NBTK.shape[1:])

    def of_layer(chosen_BTK: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(weights_BTK.reshape(-1), chosen_BTK.reshape(-1), num_segments=count)

    return jax.vmap(of_layer)(chosen_NBTK)


def _work(batch: CleanBatch, noisy: NoisyBatch, diffusion: DiffusionConfig) -> Work:
    """Returns the work of `predicting_states` and the head on `noisy`, the corrupted `batch`."""
    once = _teacher_work(batch, noisy)
    copies = 2 if diffusion.has_blocks else 1  # a noisy and a clean one in the same row
    scored = ((noisy.weights != 0) | (noisy.teacher_weights != 0)).sum().astype(jnp.float32)
    return Work(copies * once.tokens, copies**2 * once.pairs, scored)


def _teacher_work(batch: CleanBatch, noisy: NoisyBatch) -> Work:
    """Returns the work of one pass over the rows of `noisy`: those of `batch`, twice with complementary masks."""
    repeats = noisy.tokens.shape[0] // batch.tokens.shape[0]
    return jax.tree.map(lambda x: repeats * x, work_of_examples(batch.segments, batch.lengths))


def _score(
    model: Transformer,
    corruption: Corruption,
    chunk: int,
    variables: dict[str, Any],
    teacher: Teacher | None,
    noisy: NoisyBatch,
    weights_BL: jax.Array,
) -> tuple[jax.Array, Scores, jax.Array | None]:
    """Returns (the loss as a sum, scores [B, L], chosen experts) of the model on `noisy`.

    The targets are the clean tokens, weighted with `weights_BL`.
    """
    hidden_BLD, chosen = _states(model, corruption.diffusion, variables, noisy)
    loss, scores = scored_cross_entropy(
        _flat(hidden_BLD),
        head_weight(model.config, variables["params"]),
        _flat(noisy.clean),
        _flat(weights_BL),
        Outputs(corruption.diffusion.mask_token_id, model.config.vocab_size, model.config.logit_softcap),
        chunk,
        jax.tree.map(_flat, teacher),
    )
    return loss, Scores(*(x_M.reshape(noisy.tokens.shape) for x_M in scores)), chosen


def _flat(x_BL: jax.Array) -> jax.Array:
    """Reshapes [B, L, ...] to [M, ...]."""
    return x_BL.reshape(-1, *x_BL.shape[2:])


def predicting_states(
    model: Transformer, diffusion: DiffusionConfig, variables: dict[str, Any], noisy: NoisyBatch
) -> jax.Array:
    """Returns the states [B, L, D] that predict each token of a corrupted batch."""
    return _states(model, diffusion, variables, noisy)[0]


def _states(model, diffusion, variables, noisy: NoisyBatch) -> tuple[jax.Array, jax.Array | None]:
    """Returns (`predicting_states`, experts chosen for each token: int32 [N, B, T, K], or None without experts)."""
    if diffusion.has_blocks:
        return _block_states(model, diffusion, variables, noisy)
    view = diffusion.view(noisy.layout, open_BTS=noisy.open, lengths_B=noisy.row_lengths)
    hidden_BLD, chosen = _run(model, variables, noisy.tokens, noisy.positions, view, noisy.dropout_seeds)
    return diffusion.predicting(hidden_BLD), chosen


def _run(model, variables, *rows: Any) -> tuple[jax.Array, jax.Array | None]:
    if model.config.experts is None:
        return model.apply(variables, *rows), None
    hidden_BTD, updated = model.apply(variables, *rows, mutable=["routing"])
    return hidden_BTD, jnp.concatenate(jax.tree.leaves(updated["routing"]))


def _block_states(model, diffusion, variables, noisy: NoisyBatch) -> tuple[jax.Array, jax.Array | None]:
    """`_states` for block attention: a noisy and a clean copy of each row run together (BD3-LM, arXiv:2503.09573).

    A noisy block sees the clean blocks before it, as in generation. With the shift, the first token of a block is
    predicted from the clean copy of the block before it, which is finished by then.
    """
    length, seeds_BL = noisy.clean.shape[1], noisy.dropout_seeds
    rows = noisy.layout.twice()
    view = diffusion.view(
        rows,
        noisy_T=jnp.arange(2 * length) < length,
        open_BTS=None if noisy.open is None else jnp.tile(noisy.open, (1, 2, 2)),
    )
    hidden_BLD, chosen = _run(
        model,
        variables,
        jnp.concatenate([noisy.tokens, noisy.clean], axis=1),
        rows.positions,
        view,
        None if seeds_BL is None else jnp.concatenate([seeds_BL, fold_seeds(seeds_BL, 0)], axis=1),
    )
    noisy_BLD, clean_BLD = jnp.split(hidden_BLD, 2, axis=1)
    if not diffusion.shift:
        return noisy_BLD, chosen
    opens_BL = diffusion.block_starts(noisy.positions, noisy.prompt_lengths) == noisy.positions
    states_BLD = jnp.where(opens_BL[..., None], diffusion.predicting(clean_BLD), diffusion.predicting(noisy_BLD))
    return states_BLD, chosen
