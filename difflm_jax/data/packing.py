"""Plans which examples share a row and which rows share a step, from lengths, a seed and an epoch alone."""

import dataclasses
import functools
import math

import numpy as np

from difflm_jax.errors import UserError

BATCHING = ("rows", "grouped", "packed", "shared")
PACKED = ("packed", "shared")  # rows hold several examples
GROUPED_STEPS = 64  # "grouped" sorts by length within the rows of this many steps


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The rows of an epoch: row r holds the examples `ids[starts[r]:starts[r + 1]]`, one after another."""

    ids: np.ndarray  # [examples]
    starts: np.ndarray  # [rows + 1]

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """How tokenised rows become batches.

    A step holds `accumulation` micro-batches of `batch_size` rows, over all devices. `batching` is one of:

    rows: one example per row, in a new permutation each epoch. A step is as wide as its longest row.
    grouped: the same, but within every `GROUPED_STEPS` steps, rows of similar length share a step.
    packed: rows of width `row_length`, each with as many examples as fit (best fit, longest first). Examples of equal
      length swap places between epochs, and the rows are permuted.
    shared: packed, and the tokens that all examples begin with are stored once per row.

    Widths are rounded up to a multiple of `length_multiple`. Rows are padded on the right with `pad_id`. With
    `answer_padding` n > 0, an answer at the end of an example is extended with `eos_id` until its length is a multiple
    of n or the example has `max_length` tokens. These tokens count as answer. With `row_examples` n > 0, packed rows
    are only as wide as n examples of mean length, and not narrower than the longest (`fitted`).
    """

    batch_size: int
    max_length: int
    accumulation: int = 1
    batching: str = "rows"
    length_multiple: int = 64
    answer_padding: int = 0
    pad_id: int = 0
    eos_id: int | None = None
    seed: int = 0
    shuffle: bool = True
    row_examples: int = 0

    def __post_init__(self) -> None:
        if self.batching not in BATCHING:
            raise UserError(f"batching={self.batching!r}: must be one of {', '.join(BATCHING)}")
        for key in ("batch_size", "accumulation"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.answer_padding and self.eos_id is None:
            raise UserError(f"answer_padding={self.answer_padding}: needs a tokenizer with an EOS token")

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, filler rows included."""
        return self.batch_size * self.accumulation

    @property
    def row_length(self) -> int:
        """`max_length`, rounded up: the width of packed rows."""
        return -(-self.max_length // self.length_multiple) * self.length_multiple

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several examples, and all rows are `row_length` wide."""
        return self.batching in PACKED

    def fitted(self, lengths: np.ndarray, shared: int) -> "BatchOptions":
        """These options with the row width that `row_examples` asks for, given examples that share `shared` tokens."""
        if not (self.row_examples and self.is_packed and len(lengths)):
            return self
        wanted = shared + math.ceil(self.row_examples * (lengths.mean() - shared))
        return dataclasses.replace(self, max_length=min(max(wanted, int(lengths.max())), self.max_length))


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """Plans which examples, given their `lengths`, share a row and which rows share a step.

    The first `shared` tokens, which all examples have in common, are stored once per row. The number of rows is the
    same in every epoch, because best fit depends on the lengths alone.
    """

    lengths: np.ndarray  # [examples], with `answer_padding`
    options: BatchOptions
    shared: int = 0

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch(0).num_rows // self.options.rows_per_step)

    @functools.cached_property
    def real_share(self) -> float:
        """Share of real tokens among all tokens of an epoch, padding included. Filler rows do not count."""
        plan = self.epoch(0)
        if self.options.is_packed:
            tokens = (self.lengths - self.shared).sum() + plan.num_rows * self.shared
            return float(tokens / (plan.num_rows * self.options.row_length))
        rows_per_step = self.options.rows_per_step
        steps = np.split(self.lengths[plan.ids], np.arange(rows_per_step, plan.num_rows, rows_per_step))
        multiple = self.options.length_multiple
        widths = [-(-step.max(initial=0) // multiple) * multiple for step in steps]
        return float(self.lengths.sum() / np.dot(widths, [len(step) for step in steps]))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a run has few plans, and they live as long as it does
    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of epoch number `epoch`."""
        count = len(self.lengths)
        generator = np.random.default_rng([self.options.seed, epoch])
        ids = generator.permutation(count) if self.options.shuffle else np.arange(count)
        if self.options.is_packed:
            return self._packed(ids, generator)
        if self.options.batching == "grouped":
            ids = self._grouped(ids, generator)
        return EpochPlan(ids, np.arange(count + 1))

    def _grouped(self, ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        rows_per_step = self.options.rows_per_step
        window = GROUPED_STEPS * rows_per_step
        parts = [ids[first : first + window] for first in range(0, len(ids), window)]
        ids = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts] or [ids])
        whole = len(ids) // rows_per_step * rows_per_step  # an incomplete step stays last
        steps = ids[:whole].reshape(-1, rows_per_step)
        order = generator.permutation(len(steps)) if self.options.shuffle else np.arange(len(steps))
        return np.concatenate([steps[order].reshape(-1), ids[whole:]])

    def _packed(self, ids: np.ndarray, generator: np.random.Generator) -> EpochPlan:
        ids = ids[np.argsort(-self.lengths[ids], kind="stable")]  # longest first, ties in the order drawn
        row_of = best_fit(self.lengths[ids] - self.shared, self.options.row_length - self.shared)
        sizes = np.bincount(row_of)
        order = generator.permutation(len(sizes)) if self.options.shuffle else np.arange(len(sizes))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ids = ids[np.argsort(place[row_of], kind="stable")]
        return EpochPlan(ids, np.concatenate([[0], np.cumsum(sizes[order])]))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns each length in turn to the fullest row with room for it, else to a new row. Returns the row indices.

    Lengths in descending order give best-fit decreasing, which needs about 11/9 of the optimal number of rows at most
    (Johnson, "Near-optimal bin packing algorithms", 1973). The cost per length does not depend on the number of rows.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room left in them
    rooms = 0  # bit r is set if some row has room r left
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
