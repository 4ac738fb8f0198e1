"""From tokenised rows to batches: the train/test split, and random access to the batch of any step.

`batches(...)[step]` is a pure function of the rows, the plan and the step. The position of a run is one integer, so a
resumed run needs no iterator state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from difflm_jax.data.fields import ROW_LENGTHS, SHARED_SEGMENT, PlacedExample, empty_rows, put_example
from difflm_jax.data.packing import BatchOptions, BatchPlan
from difflm_jax.data.shared_prefix import shared_prefix
from difflm_jax.data.stored import column, tables
from difflm_jax.errors import UserError

if TYPE_CHECKING:
    import datasets
    import grain


def split(dataset: datasets.Dataset, test_size: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits `dataset` into (train, test) by a hash of each row's content and `seed`.

    The hash is a draw in [0, 1); a row is a test row if it is below `test_size`. Equal rows are on the same side in
    every data set, and adding rows moves none. To keep both sides non-empty, the content with the lowest draw always
    goes to the test split and the one with the highest never does. With `test_size=0` the test split is empty. Raises
    `UserError` if all rows have the same content.
    """
    if not 0 <= test_size < 1:
        raise UserError(f"test_size={test_size}: is a share of the rows, at least 0 and below 1")
    if test_size == 0:
        return dataset, dataset.select([])
    draws = _draws(column(dataset, "content_hash"), seed)
    if draws.min(initial=1) >= draws.max(initial=0):
        raise UserError(
            f"test_size={test_size}: {len(dataset)} rows with one and the same content cannot be divided in two; add "
            "rows or set test_size to 0"
        )
    is_test = ((draws < test_size) | (draws == draws.min())) & (draws != draws.max())
    return dataset.select(np.flatnonzero(~is_test)), dataset.select(np.flatnonzero(is_test))


def _draws(content_hash: np.ndarray, seed: int) -> np.ndarray:
    """[n] float64 in [0, 1): each hash mixed with the seed (finaliser of splitmix64)."""
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    x = content_hash.astype(np.int64).view(np.uint64) ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0**-53


def plan_batches(rows: datasets.Dataset, options: BatchOptions) -> BatchPlan:
    """Plans the batches of tokenised `rows`. This is the costly part of `batches`, so call it once."""
    lengths, added = _lengths(rows, options.answer_padding, options.max_length)
    if len(lengths) and (longest := int(lengths.max())) > options.max_length:
        raise ValueError(f"a row of {longest} tokens was not made for max_length={options.max_length}")
    shared = shared_prefix(rows) if options.batching == "shared" else 0
    return BatchPlan(lengths + added, options.fitted(lengths + added, shared), shared)


def _lengths(rows: datasets.Dataset, answer_padding: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two arrays [examples]: tokens of each example, and EOS tokens that extend its last answer."""
    length, answer = (column(rows, name).astype(np.int64) for name in ("length", "final_answer_length"))
    if not answer_padding:
        return length, np.zeros_like(length)
    return length, np.where(answer, np.minimum(-answer % answer_padding, max_length - length), 0)


def batches(
    rows: datasets.Dataset,
    plan: BatchPlan,
    *,
    epochs: int = 1,
    strata: str = "step",
    local_rows: np.ndarray | None = None,
) -> grain.MapDataset:
    """Returns the batches of a run: element `step` holds the data of one optimiser step, for all devices.

    An element is a dict of arrays [A, B, L] (and one [A, B]), the fields of `difflm_jax.data.fields`. A is the number
    of micro-batches and B the rows of each. L is the width of the step's longest row, or `row_length` if rows are
    packed. Every epoch has its own permutation, and its last step is completed with filler rows. The division of a
    step's rows into A times B changes nothing else.

    strata: whether an example's stratum in [0, 1) is its place among the examples of the "step" or among all "rows".
    local_rows: the rows of every micro-batch to read, all by default. In a run with several processes, each reads its
      own. The contents of a row do not depend on which others are read.
    """
    if epochs < 1:
        raise UserError(f"epochs={epochs}: must be at least 1")
    import grain  # here and below, not at the top: `--help` should not wait for it

    options = plan.options
    local_rows = np.arange(options.batch_size) if local_rows is None else local_rows
    collate = _Collate(rows.with_format("arrow"), plan, strata == "rows", local_rows)
    return grain.MapDataset.range(epochs * plan.steps_per_epoch).map(collate)


@dataclasses.dataclass(frozen=True)
class _Collate:
    """Maps the number of a step to its arrays."""

    table: datasets.Dataset
    plan: BatchPlan
    strata_of_rows: bool
    local_rows: np.ndarray

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        options = self.plan.options
        epoch, index = divmod(int(step), self.plan.steps_per_epoch)
        rows = self.plan.epoch(epoch)
        first = index * options.rows_per_step
        starts = rows.starts[first : first + options.rows_per_step + 1]
        ids = rows.ids[starts[0] : starts[-1]]
        starts = starts - starts[0]

        places = (np.arange(options.accumulation)[:, None] * options.batch_size + self.local_rows).reshape(-1)
        batch = empty_rows(len(places), self._width(ids), options.pad_id)
        for row, place in enumerate(places):
            if place < len(starts) - 1:
                self._fill(batch, row, ids, range(starts[place], starts[place + 1]))
        if not options.is_packed:
            batch[ROW_LENGTHS] = batch["lengths"].max(axis=1)
        shape = (options.accumulation, len(self.local_rows))
        return {name: field.reshape(*shape, *field.shape[1:]) for name, field in batch.items()}

    def _width(self, ids: np.ndarray) -> int:
        options = self.plan.options
        if options.is_packed:
            return options.row_length
        return -(-int(self.plan.lengths[ids].max()) // options.length_multiple) * options.length_multiple

    def _fill(self, batch: dict[str, np.ndarray], row: int, ids: np.ndarray, places: range) -> None:
        """Writes the examples `ids[places]`, one after another, into row `row`. `ids` are those of the whole step."""
        start = shared = self.plan.shared
        examples = ids[places.start : places.stop]
        for segment, (place, text) in enumerate(zip(places, _read_rows(self.table, examples), strict=True), start=1):
            example = self._placed(*text, segment, int(ids[place]), place / len(ids))
            end = start + len(example.tokens) - shared
            put_example(batch, row, slice(start, end), example, slice(shared, None))
            if segment == 1:
                put_example(batch, row, slice(0, shared), example, slice(0, shared))
            start = end
        batch["segments"][row, :shared] = SHARED_SEGMENT

    def _placed(
        self,
        tokens: np.ndarray,
        answer_mask: np.ndarray,
        prompt_length: int,
        segment: int,
        example_id: int,
        stratum: float,
    ) -> PlacedExample:
        """The example with its last answer extended by EOS tokens, as planned."""
        if added := int(self.plan.lengths[example_id]) - len(tokens):
            tokens = np.append(tokens, [self.plan.options.eos_id] * added).astype(np.int32)
            answer_mask = np.append(answer_mask, [True] * added)
        stratum = example_id / len(self.plan.lengths) if self.strata_of_rows else stratum
        return PlacedExample(tokens, answer_mask, prompt_length, segment, example_id, stratum)


def _read_rows(table: datasets.Dataset, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Returns (tokens, answer mask, prompt length) for each of the rows `ids`, read in one go."""
    if not len(ids):
        return []
    found: pa.Table = table[[int(i) for i in ids]]
    tokens, answer_mask = found["tokens"].combine_chunks(), found["answer_mask"].combine_chunks()
    ends = np.cumsum(tokens.value_lengths().to_numpy())[:-1]
    return list(
        zip(
            np.split(tokens.flatten().to_numpy(), ends),
            np.split(answer_mask.flatten().to_numpy(zero_copy_only=False), ends),
            found["prompt_length"].to_pylist(),
            strict=True,
        )
    )


def prefetch(dataset: grain.MapDataset, start_step: int = 0, num_threads: int = 2) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over `dataset` from `start_step` on, prefetched by `num_threads` threads (0: on demand)."""
    import grain

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset[start_step:].to_iter_dataset(options))


def describe(dataset: datasets.Dataset) -> str:
    """Summarises a data set in one line: rows, tokens, answer tokens, and percentiles of the lengths."""
    if not len(dataset):
        return "0 rows"
    answer_tokens = 0
    for table in tables(dataset, ["answer_mask"]):
        answer_tokens += pa.compute.sum(table["answer_mask"].combine_chunks().flatten()).as_py() or 0
    lengths = column(dataset, "length").astype(np.int64)
    p50, p95 = np.percentile(lengths, (50, 95))
    return (
        f"{len(dataset):,} rows, {lengths.sum():,} tokens ({answer_tokens:,} of answers), lengths: p50 {p50:.0f}, "
        f"p95 {p95:.0f}, longest {lengths.max()}"
    )
