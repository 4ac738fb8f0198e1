"""The draft objective: noise rows after a clean text learn what the causal base says there (Uno, arXiv:2609.04010).

Row j after column p sees the base's keys and values of columns 0..p and the noise rows before it. It learns the base's
token p + j + 1. The clean copy is never differentiated: it runs without the adapter, and only its keys and values are
read. They never change, so that a batch may carry those of an earlier step (`CleanBatch.clean`). A step then costs the
noise rows alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.data.fields import SHARED_SEGMENT
from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.segments import work_of_examples
from difflm_jax.models.attention import View
from difflm_jax.models.flops import Work
from difflm_jax.models.transformer import Transformer, head_logits, head_weight
from difflm_jax.ops.cross_entropy import Outputs, Teacher, scored_cross_entropy
from difflm_jax.ops.random import fold_seeds, token_seeds, uniform
from difflm_jax.utils.settings import NOT_NEGATIVE, POSITIVE, setting

DEPTH_BUCKETS = 5  # depths are reported as 1, 2, 3, 4, and 5 or more
DEPTH_DECAY = 0.8  # weight of a row: DEPTH_DECAY ** (depth - 1), as a draft counts only if all before it are right
_ANCHOR_STREAM, _NOISE_STREAM, _DROPOUT_STREAM = 6, 7, 8


@dataclasses.dataclass(frozen=True)
class Draft:
    """Settings of the draft objective. `steps`: steps of the phase, over which the curriculum is spread."""

    rows: int = setting(4, "Noise rows after the last token, m: the most drafts per pass.", within=POSITIVE)
    curriculum: tuple[int, ...] = setting(
        (2, 4), "Noise rows in each of several equal stages of training; at most draft.rows.", within=POSITIVE,
        required=True,
    )  # fmt: skip
    noise: str = setting(
        "uniform", "uniform: ids over the vocabulary, as SGLang draws them; mask: the mask token.",
        choices=("uniform", "mask"),
    )  # fmt: skip
    loss: str = setting(
        "argmax", "argmax: cross-entropy with the base's choice; kl, tv: divergence from its distribution.",
        choices=("argmax", "kl", "tv"),
    )  # fmt: skip
    answers: str = setting(
        "regenerate", "regenerate: the base answers every prompt greedily first; own: the data's answers.",
        choices=("regenerate", "own"),
    )  # fmt: skip
    anchors: int = setting(8, "Places per row and step after which noise rows are inserted.", within=POSITIVE)
    prompts: int = setting(2000, "Prompts of the training split that are regenerated; 0: all.", within=NOT_NEGATIVE)
    answer_tokens: int = setting(128, "Maximum number of tokens of a regenerated answer.", within=POSITIVE)
    keep_gib: float = setting(
        4.0, "Host memory for the base's keys and values of training rows, which later epochs read; 0: none.",
        within=NOT_NEGATIVE,
    )  # fmt: skip
    steps: int = 1

    @property
    def needs_distribution(self) -> bool:
        """Whether the loss reads more of the base than its keys and values."""
        return self.loss != "argmax" or self.answers == "own"

    def rows_at(self, index: jax.Array | int) -> jax.Array:
        """Returns int32 []: noise rows after an anchor at step `index`."""
        stages = jnp.minimum(jnp.array(self.curriculum, jnp.int32), self.rows)
        return stages[jnp.minimum(index * len(self.curriculum) // self.steps, len(self.curriculum) - 1)]

    def most_anchors(self, train: bool) -> int:
        """Returns the largest number of anchors per row: that with the fewest noise rows of the curriculum."""
        return self.anchors * self.rows // min(*self.curriculum, self.rows) if train else self.anchors


@struct.dataclass
class CleanCopy:
    """What noise rows read of the base's pass over the clean text, rows first. It is never differentiated."""

    columns: Any  # keys and values of each stack of layers, [B, N, K, L, E]
    hidden: jax.Array | None  # [B, L, D]; None where `Draft.needs_distribution` is false


@struct.dataclass
class NoiseRows:
    """Noise rows of a batch, M per row. Those of an anchor are contiguous."""

    columns: jax.Array  # [B, M] int32, the anchor's column
    anchors: jax.Array  # [M] int32, number of the anchor
    depths: jax.Array  # [M] int32, from 1
    valid: jax.Array  # [B, M] bool, False if there is no anchor, or no token to learn in the example

    def at(self, x_BL: jax.Array, ahead: jax.Array | int = 0) -> jax.Array:
        """Returns `x` [B, M, ...] at the anchors' columns, or `ahead` columns after them."""
        index = jnp.minimum(self.columns + ahead, x_BL.shape[1] - 1)
        return jnp.take_along_axis(x_BL, index.reshape(*index.shape, *(1,) * (x_BL.ndim - 2)), axis=1)

    @property
    def sees(self) -> jax.Array:
        """[M, M] bool: a noise row (query) sees itself and the earlier rows of its anchor (keys)."""
        step = jnp.arange(len(self.anchors))
        return (self.anchors == self.anchors[:, None]) & (step <= step[:, None])


def noise_rows(batch: CleanBatch, scope: str, draft: Draft, key: jax.Array, index, train: bool) -> NoiseRows:
    """Draws the noise rows of a step. Anchors are drawn without replacement among the columns of each row.

    An anchor is followed by a token of an answer (with `scope` "all": any token) and by one more token to learn.
    """
    is_scored = batch.answer_mask if scope == "answer" else batch.segments != 0
    learns = (batch.segments > 0) & (batch.positions + 2 < batch.lengths) & jnp.roll(is_scored, -1, axis=1)
    draws = uniform(token_seeds(jax.random.fold_in(key, _ANCHOR_STREAM), batch.example_ids, batch.positions))
    count = min(draft.most_anchors(train), batch.tokens.shape[1])
    best, columns = jax.lax.top_k(jnp.where(learns, draws, -1.0), count)
    rows = draft.rows_at(index) if train else draft.rows
    number = jnp.arange(draft.anchors * draft.rows, dtype=jnp.int32)
    anchors = jnp.minimum(number // rows, count - 1)
    placed = NoiseRows(columns[:, anchors], anchors, number % rows + 1, best[:, anchors] >= 0)
    remaining = placed.at(batch.lengths) - placed.at(batch.positions)
    has_target = (placed.depths + 1 < remaining) & (number // rows < count)
    return placed.replace(valid=placed.valid & has_target)


def draft_sums(
    model: Transformer,
    corruption: Corruption,
    variables: dict[str, Any],
    batch: CleanBatch,
    key: jax.Array,
    chunk: int,
    train: bool,
    index: jax.Array | int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (the loss as a sum, the fields of `objective.LossSums`).

    Buckets are depths. `masked_correct` counts the rows whose draft and all drafts before it are the base's choice: its
    sum divided by the count of depth 1 is the mean number of accepted drafts.
    """
    diffusion, draft = corruption.diffusion, corruption.draft
    rows = noise_rows(batch, corruption.scope, draft, key, index, train)
    clean = batch.clean if batch.clean is not None else clean_copy(model, corruption, variables["params"], batch)
    hidden_BMD = model.apply(
        {**variables, "columns": _layers_first(clean.columns)},
        _noise(rows, batch, draft, diffusion, key, model.config.vocab_size),
        rows.at(batch.positions) + rows.depths,
        _view(rows, batch),
        _dropout_seeds(rows, batch, key) if train else None,
    )
    weights_BM = rows.valid * DEPTH_DECAY ** (rows.depths - 1.0)
    teacher_BMD = rows.at(clean.hidden, rows.depths) if draft.needs_distribution else None
    targets_BM = rows.at(batch.tokens, rows.depths + 1)
    if draft.answers == "own":
        targets_BM = _outputs(model, diffusion, variables, teacher_BMD).argmax(axis=-1).astype(jnp.int32)

    is_argmax = draft.loss == "argmax"
    teacher = Teacher(_flat(teacher_BMD), _flat(weights_BM)) if draft.loss == "kl" else None
    ce_weights_BM = weights_BM if is_argmax else rows.valid * jnp.finfo(jnp.float32).tiny  # scored, and not trained
    loss, scores = scored_cross_entropy(
        _flat(hidden_BMD),
        head_weight(model.config, variables["params"]),
        _flat(targets_BM),
        _flat(ce_weights_BM),
        Outputs(diffusion.mask_token_id, model.config.vocab_size, model.config.logit_softcap),
        chunk,
        teacher,
    )
    if draft.loss == "tv":
        p, q = (jax.nn.softmax(_outputs(model, diffusion, variables, x)) for x in (teacher_BMD, hidden_BMD))
        loss += (weights_BM * (1.0 - jnp.minimum(p, q).sum(axis=-1))).sum()

    correct_BM = rows.valid & (scores.correct.reshape(rows.valid.shape) > 0)
    reached_BM = (correct_BM[:, None, :] | ~rows.sees).all(axis=2)
    bucket_BM = jnp.broadcast_to(jnp.minimum(rows.depths, DEPTH_BUCKETS) - 1, rows.valid.shape)

    def by_depth(values_BM: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(_flat(rows.valid * values_BM), _flat(bucket_BM), num_segments=DEPTH_BUCKETS)

    return loss, {
        "loss": jax.lax.stop_gradient(loss),
        "weight": weights_BM.sum(),
        "masked_nll": by_depth(scores.nll.reshape(rows.valid.shape)),
        "masked_correct": by_depth(reached_BM.astype(jnp.float32)),
        "masked_count": by_depth(jnp.ones(rows.valid.shape)),
        "tokens": (batch.segments != 0).sum().astype(jnp.float32),
        "work": _work(rows, batch),
        "frozen_work": work_of_examples(batch.segments, batch.lengths),
    }


def _work(rows: NoiseRows, batch: CleanBatch) -> Work:
    """Returns the work of the pass with a gradient: noise rows, each after the clean text up to its anchor."""
    valid_BM = rows.valid.astype(jnp.float32)
    seen_BM = rows.at(batch.positions) + 1 + rows.depths
    return Work(valid_BM.sum(), (valid_BM * seen_BM).sum(), valid_BM.sum())


def draft_logits(
    model: Transformer,
    diffusion: DiffusionConfig,
    variables: dict[str, Any],
    batch: CleanBatch,
    rows: NoiseRows,
    draft: Draft,
    key: jax.Array,
) -> jax.Array:
    """Returns float32 logits [B, M, V] of the noise `rows` after clean text, as in a drafting pass."""
    clean = clean_copy(model, Corruption(diffusion, draft=draft), variables["params"], batch)
    noise = _noise(rows, batch, draft, diffusion, key, model.config.vocab_size)
    positions = rows.at(batch.positions) + rows.depths
    hidden_BMD = model.apply(
        {**variables, "columns": _layers_first(clean.columns)}, noise, positions, _view(rows, batch)
    )
    return _outputs(model, diffusion, variables, hidden_BMD)


def accepted_drafts(reached: Any, count: Any) -> dict[str, Any]:
    """Returns the accepted drafts of decoding with two passes per cycle, from sums over a test split.

    `reached` and `count` are `masked_correct` and `masked_count` of `draft_sums`. Values are None if there are no
    anchors.
    """
    anchors = float(count[0])
    by_depth = [float(x) / anchors if anchors else None for x in reached]
    accepted = sum(by_depth) if anchors else None
    return {
        "accepted": accepted,
        "tokens_per_cycle": 2 + accepted if anchors else None,
        "accepted_by_depth": by_depth,
    }


def clean_copy(model: Transformer, corruption: Corruption, params: Any, batch: CleanBatch) -> CleanCopy:
    """Returns what the base's pass over the clean rows of `batch` leaves for noise rows."""
    layout = Layout(batch.positions, batch.segments != 0, batch.prompt_lengths, batch.segments)
    base, view = model.clone(lora=None, remat="none"), corruption.diffusion.causal().view(layout)
    hidden_BLD, kept = base.apply({"params": params}, batch.tokens, batch.positions, view, mutable=["rows"])
    columns = jax.tree.map(lambda x_NBKLE: jnp.moveaxis(x_NBKLE, 0, 1), kept["rows"])
    return jax.lax.stop_gradient(CleanCopy(columns, hidden_BLD if corruption.draft.needs_distribution else None))


def _layers_first(columns: Any) -> Any:
    return jax.tree.map(lambda x_BNKLE: jnp.moveaxis(x_BNKLE, 1, 0), columns)


def _view(rows: NoiseRows, batch: CleanBatch) -> View:
    """Returns the view of noise rows: the clean columns of their example and its shared prefix up to the anchor, and
    the earlier noise rows."""
    position_BM, segment_BM = rows.at(batch.positions), rows.at(batch.segments)
    key_segment = batch.segments[:, None, :]
    known = (key_segment == segment_BM[..., None]) | (key_segment == SHARED_SEGMENT)
    known &= batch.positions[:, None, :] <= position_BM[..., None]
    own = jnp.broadcast_to(rows.sees, (*position_BM.shape, position_BM.shape[1]))
    query_BM = position_BM + rows.depths
    return View(jnp.concatenate([known, own], axis=2), query_BM, jnp.concatenate([batch.positions, query_BM], axis=1))


def _noise(rows: NoiseRows, batch: CleanBatch, draft: Draft, diffusion: DiffusionConfig, key, vocabulary: int):
    """Returns tokens [B, M] int32 of the noise rows: mask tokens, or draws seeded by example, anchor and depth."""
    if draft.noise == "mask":
        return jnp.full(rows.valid.shape, diffusion.mask_token_id, jnp.int32)
    seeds = _row_seeds(rows, batch, jax.random.fold_in(key, _NOISE_STREAM))
    return (seeds % jnp.uint32(vocabulary)).astype(jnp.int32)


def _dropout_seeds(rows: NoiseRows, batch: CleanBatch, key: jax.Array) -> jax.Array:
    return _row_seeds(rows, batch, jax.random.fold_in(key, _DROPOUT_STREAM))


def _row_seeds(rows: NoiseRows, batch: CleanBatch, key: jax.Array) -> jax.Array:
    return fold_seeds(token_seeds(key, rows.at(batch.example_ids), rows.at(batch.positions)), rows.depths)


def _outputs(model: Transformer, diffusion: DiffusionConfig, variables: dict[str, Any], hidden_BMD: jax.Array):
    """Returns float32 logits [B, M, V], with -inf for the mask token."""
    logits = head_logits(model.config, variables["params"], None, None, hidden_BMD)
    return jnp.where(jnp.arange(logits.shape[-1]) == diffusion.mask_token_id, -jnp.inf, logits)


def _flat(x_BM: jax.Array) -> jax.Array:
    return x_BM.reshape(-1, *x_BM.shape[2:])
