"""Which examples share a row, and which rows a step: plans that follow from lengths, a seed and an epoch alone."""

import dataclasses
import functools

import numpy as np

from difflm_jax.errors import UserError

BATCHING = ("rows", "grouped", "packed", "shared")
PACKED = ("packed", "shared")  # those by which a row holds several examples
GROUPED_STEPS = 64  # steps among whose rows "grouped" sorts by length


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The rows of an epoch: row r holds the examples `ids[starts[r]:starts[r + 1]]`, one behind the other."""

    ids: np.ndarray  # [examples]
    starts: np.ndarray  # [rows + 1]

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Batching:
    """How examples of the given `lengths` become rows of at most `row_length` tokens, and rows steps.

    rows: an example a row, in the order of a permutation of each epoch; a step is as wide as its longest row.
    grouped: the same, but among the rows of every `GROUPED_STEPS` steps those of like length share a step.
    packed: as many examples as fit into rows that are all `row_length` wide (best fit, longest first; examples of equal
      length take each other's places from epoch to epoch); then a permutation of the rows.
    shared: packed, and the `shared` tokens that all examples begin with stand in a row once.

    The number of rows is the same in every epoch, because a best fit depends on the lengths alone.
    """

    lengths: np.ndarray  # [examples]
    kind: str
    row_length: int
    rows_per_step: int
    seed: int
    shuffle: bool
    shared: int = 0

    def __post_init__(self) -> None:
        if self.kind not in BATCHING:
            raise UserError(f"batching={self.kind!r}: must be one of {', '.join(BATCHING)}")

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several examples, and all rows are `row_length` wide."""
        return self.kind in PACKED

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch(0).num_rows // self.rows_per_step)

    @functools.cached_property
    def real_share(self) -> float:
        """The share of real tokens in an epoch's rows, before widths are rounded up; filler rows are not counted."""
        plan = self.epoch(0)
        if self.is_packed:
            tokens = (self.lengths - self.shared).sum() + plan.num_rows * self.shared
            return float(tokens / (plan.num_rows * self.row_length))
        steps = np.split(self.lengths[plan.ids], np.arange(self.rows_per_step, plan.num_rows, self.rows_per_step))
        return float(self.lengths.sum() / sum(step.max(initial=0) * len(step) for step in steps))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a run has a few of these, for as long as it lasts
    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of epoch number `epoch`."""
        count = len(self.lengths)
        generator = np.random.default_rng([self.seed, epoch])
        ids = generator.permutation(count) if self.shuffle else np.arange(count)
        if self.is_packed:
            return self._packed(ids, generator)
        if self.kind == "grouped":
            ids = self._grouped(ids, generator)
        return EpochPlan(ids, np.arange(count + 1))

    def _grouped(self, ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        window = GROUPED_STEPS * self.rows_per_step
        parts = [ids[first : first + window] for first in range(0, len(ids), window)]
        ids = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts] or [ids])
        whole = len(ids) // self.rows_per_step * self.rows_per_step  # a shorter step stays last
        steps = ids[:whole].reshape(-1, self.rows_per_step)
        order = generator.permutation(len(steps)) if self.shuffle else np.arange(len(steps))
        return np.concatenate([steps[order].reshape(-1), ids[whole:]])

    def _packed(self, ids: np.ndarray, generator: np.random.Generator) -> EpochPlan:
        ids = ids[np.argsort(-self.lengths[ids], kind="stable")]  # longest first, equal ones in the order drawn
        row_of = best_fit(self.lengths[ids] - self.shared, self.row_length - self.shared)
        sizes = np.bincount(row_of)
        order = generator.permutation(len(sizes)) if self.shuffle else np.arange(len(sizes))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ids = ids[np.argsort(place[row_of], kind="stable")]
        return EpochPlan(ids, np.concatenate([[0], np.cumsum(sizes[order])]))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each of `lengths` in turn: the fullest that still has room for it, else a new one.

    Given in descending order this is best-fit decreasing, which needs at most 11/9 of the fewest possible rows
    (Johnson, "Near-optimal bin packing algorithms", 1973). An operation a length, whatever the number of rows.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that they have left
    rooms = 0  # bit r: there are rows with room r
    rows = 0
    row_of = np.empty(len(lengths), np.int64)
    for index, length in enumerate(lengths.tolist()):
        if not 0 < length <= capacity:
            raise ValueError(f"an example of {length} tokens does not fit into rows of {capacity}")
        wide_enough = rooms >> length
        if wide_enough:
            room = length + (wide_enough & -wide_enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, rows
            rows += 1
        row_of[index] = row
        left = room - length
        if left:
            by_room[left].append(row)
            rooms |= 1 << left
    return row_of
