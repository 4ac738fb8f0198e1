"""The base's keys and values of training rows, kept between steps of the draft objective.

The base is frozen and sees no noise: its pass over an example gives the same result in every epoch. `CleanCopies` runs
it once, keeps the result in host memory, and hands it to the steps with their batches.

An example always passes alone in its row, padded like a batch. So a copy depends neither on its batch, nor on what is
kept, nor on the mesh, and a run that resumes has the same numbers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from difflm_jax.data.fields import FIELDS, empty_rows
from difflm_jax.diffusion.corruption import CleanBatch
from difflm_jax.diffusion.lossless import CleanCopy
from difflm_jax.distributed.collectives import TENSOR
from difflm_jax.distributed.mesh import row_shards
from difflm_jax.distributed.sharding import place_rows, rows_spec
from difflm_jax.training.phase import PhaseData
from difflm_jax.training.step import StepOptions, make_clean_step

_GIB = 2**30
_Place = tuple[tuple[int, int], slice]  # of an example in a batch: (micro-batch, row), columns


class CleanCopies:
    """Adds clean copies to batches. Copies are kept up to `gib`; those beyond are computed each time."""

    def __init__(self, options: StepOptions, mesh: Mesh, frozen: dict[str, Any], gib: float, length_multiple: int):
        self._step, self._frozen = make_clean_step(options, mesh), frozen
        self._shards, self._sharding = row_shards(mesh), NamedSharding(mesh, rows_spec(leading=0))
        self._most, self._multiple = gib * _GIB, length_multiple
        self._kept: dict[int, CleanCopy] = {}
        self.bytes = 0  # of what is kept

    def added(self, batch: Mapping[str, np.ndarray]) -> CleanBatch:
        """`batch` (arrays [A, B, L] of one process) with the copies of its examples."""
        places = _places(batch)
        missing = [id for id in places if id not in self._kept]
        made = self._made(batch, {id: places[id] for id in missing})
        copies = {id: made[id] if id in made else self._kept[id] for id in places}
        for id, copy in made.items():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(copy))
            if self.bytes + size <= self._most:
                self._kept[id] = copy
                self.bytes += size
        return CleanBatch(**batch, clean=_joined(copies, places, batch["tokens"].shape))

    def _made(self, batch: Mapping[str, np.ndarray], places: Mapping[int, _Place]) -> dict[int, CleanCopy]:
        """Copies of the examples at `places`: examples of equal width pass together, one per device."""
        widths: dict[int, list[int]] = {}
        for id, (_, columns) in places.items():
            width = -(-(columns.stop - columns.start) // self._multiple) * self._multiple
            widths.setdefault(width, []).append(id)
        made: dict[int, CleanCopy] = {}
        for width, ids in widths.items():
            for first in range(0, len(ids), self._shards):
                group = ids[first : first + self._shards]
                made |= self._pass(batch, {id: places[id] for id in group}, width)
        return made

    def _pass(self, batch: Mapping[str, np.ndarray], places: Mapping[int, _Place], width: int) -> dict[int, CleanCopy]:
        rows = empty_rows(self._shards, width)
        for row, (at, columns) in enumerate(places.values()):
            for name in FIELDS:
                rows[name][row, : columns.stop - columns.start] = batch[name][(*at, columns)]
        found = jax.device_get(self._step(self._frozen, place_rows(CleanBatch(**rows), self._sharding)))
        return {
            id: _cut(found, row, columns.stop - columns.start) for row, (id, (_, columns)) in enumerate(places.items())
        }


def clean_copies(data: PhaseData, options: StepOptions, mesh: Mesh, frozen: dict[str, Any]) -> CleanCopies | None:
    """What keeps the copies of a phase; None where no step would read what an earlier one kept.

    That is: under another objective, within one epoch, or where a copy would be divided over processes or `tensor`.
    """
    draft = options.corruption.draft
    if draft is None or not draft.keep_gib or data.steps <= data.plan.steps_per_epoch:
        return None
    if jax.process_count() > 1 or mesh.shape[TENSOR] > 1 or "params" not in frozen:
        return None
    return CleanCopies(options, mesh, frozen, draft.keep_gib, data.config.length_multiple)


def _cut(copy: CleanCopy, row: int, length: int) -> CleanCopy:
    """The first `length` tokens of a row, as arrays of their own: the length is the last axis but one of every leaf."""
    return jax.tree.map(lambda x: x[row, ..., :length, :].copy(), copy)


def _places(batch: Mapping[str, np.ndarray]) -> dict[int, _Place]:
    """Where each example stands, by its id. Examples of a row follow each other."""
    places: dict[int, _Place] = {}
    ids, segments = batch["example_ids"], batch["segments"]
    for at in np.ndindex(ids.shape[:2]):
        for segment in range(1, int(segments[at].max(initial=0)) + 1):
            columns = np.flatnonzero(segments[at] == segment)
            places[int(ids[at][columns[0]])] = (at, slice(int(columns[0]), int(columns[-1]) + 1))
    return places


def _joined(copies: Mapping[int, CleanCopy], places: Mapping[int, _Place], shape: tuple[int, ...]) -> CleanCopy | None:
    """The copies of a batch in their places, zero elsewhere: leaves [A, B, N, K, L, E] and [A, B, L, D]."""
    if not copies:
        return None

    def joined(*leaves: np.ndarray) -> np.ndarray:
        length_axis = leaves[0].ndim - 2
        own = list(leaves[0].shape)
        own[length_axis] = shape[2]
        whole = np.zeros((*shape[:2], *own), leaves[0].dtype)
        for leaf, (at, columns) in zip(leaves, places.values(), strict=True):
            whole[at][..., columns, :] = leaf
        return whole

    return jax.tree.map(joined, *(copies[id] for id in places))
