"""The data's path into training: tokenised rows, their split, and the batch of any step by its number.

`batches(...)[step]` is a pure function of the data set, the options and the step, so the position of a run is one
integer and a resumed run needs no iterator state.
"""

import dataclasses
from collections.abc import Iterator

import datasets
import grain
import numpy as np
import pyarrow as pa

from difflm_jax.data.packing import Batching
from difflm_jax.data.shared_prefix import shared_prefix
from difflm_jax.data.tokenised import tokenize
from difflm_jax.diffusion.segments import SHARED_SEGMENT
from difflm_jax.errors import UserError

__all__ = ["batches", "describe", "plan_batches", "prefetch", "split", "tokenize"]

_READ_ROWS = 10_000


def split(dataset: datasets.Dataset, test_size: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, test): a row is tested if the draw of (its content, `seed`) in [0, 1) is below `test_size`.

    The draw depends on nothing else: equal rows are on one side, in every data set, and adding rows moves none. But the
    content with the lowest draw is always tested and the one with the highest never, so that neither side is empty.
    `test_size` 0 tests nothing. Raises `UserError` if there are not two different rows to divide.
    """
    if not 0 <= test_size < 1:
        raise UserError(f"test_size={test_size}: is a share of the rows, at least 0 and below 1")
    if test_size == 0:
        return dataset, dataset.select([])
    draws = _draws(np.asarray(dataset.with_format("arrow")["content_hash"]), seed)
    if draws.min(initial=1) >= draws.max(initial=0):
        raise UserError(
            f"test_size={test_size}: {len(dataset)} rows with one and the same content cannot be divided in two; add "
            "rows or set test_size to 0"
        )
    is_test = ((draws < test_size) | (draws == draws.min())) & (draws != draws.max())
    return dataset.select(np.flatnonzero(~is_test)), dataset.select(np.flatnonzero(is_test))


def _draws(content_hash: np.ndarray, seed: int) -> np.ndarray:
    """[n] float64 in [0, 1), a mix of each hash with the seed (the finaliser of splitmix64)."""
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    x = content_hash.astype(np.int64).view(np.uint64) ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0**-53


def batches(
    dataset: datasets.Dataset,
    *,
    batch_size: int,
    accumulation: int = 1,
    epochs: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    batching: str = "rows",
    length_multiple: int = 64,
    pad_id: int = 0,
    answer_padding: int = 0,
    eos_id: int | None = None,
    max_length: int,
    local_rows: np.ndarray | None = None,
) -> grain.MapDataset:
    """The batches of a run: element `step` is what one optimiser step needs, whole, for all devices.

    An element is a dict of arrays [A, B, L] over A = `accumulation` micro-batches of B = `batch_size` rows. `batching`
    (see `difflm_jax.data.packing.Batching`) says which examples share a row and which rows a step. L is the step's
    longest row, or `max_length` where rows are packed, rounded up to a multiple of `length_multiple`. Rows are padded
    on the right with `pad_id`. The arrays are the fields of `difflm_jax.diffusion.corruption.CleanBatch`: what concerns
    an example stands at each of its tokens, so that a row may hold any number of them.

    Every epoch has a permutation of its own and ends with a step of its own, filled up with filler rows. How the rows
    of a step divide into A times B changes nothing else. `answer_padding` n > 0 lets an answer that ends a row be
    followed by `eos_id` until its length is a multiple of n, or the row's is `max_length`; these count as answer.
    `local_rows`: the rows of every micro-batch that are wanted here (of several processes each reads its own), the
    others are left out; what is left is as it would be among all.
    """
    for key, value in (("batch_size", batch_size), ("accumulation", accumulation), ("epochs", epochs)):
        if value < 1:
            raise UserError(f"{key}={value}: must be at least 1")
    if answer_padding and eos_id is None:
        raise UserError(f"answer_padding={answer_padding}: needs a tokenizer with an EOS token")
    collate = _Collate(
        dataset.with_format("arrow"),
        plan_batches(
            dataset,
            rows_per_step=batch_size * accumulation,
            batching=batching,
            max_length=max_length,
            length_multiple=length_multiple,
            answer_padding=answer_padding,
            seed=seed,
            shuffle=shuffle,
        ),
        (accumulation, batch_size),
        length_multiple,
        pad_id,
        eos_id,
        np.arange(batch_size) if local_rows is None else local_rows,
    )
    return grain.MapDataset.range(epochs * collate.plan.steps_per_epoch).map(collate)


def plan_batches(
    dataset: datasets.Dataset,
    *,
    rows_per_step: int,
    batching: str,
    max_length: int,
    length_multiple: int,
    answer_padding: int = 0,
    seed: int = 0,
    shuffle: bool = True,
) -> Batching:
    """The plan that `batches` follows."""
    lengths, added = _lengths(dataset, answer_padding, max_length)
    if len(lengths) and (longest := int(lengths.max())) > max_length:
        raise ValueError(f"a row of {longest} tokens was not made for max_length={max_length}")
    row_length = -(-max_length // length_multiple) * length_multiple
    shared = shared_prefix(dataset) if batching == "shared" else 0
    return Batching(lengths + added, batching, row_length, rows_per_step, seed, shuffle, shared)


def _lengths(dataset: datasets.Dataset, answer_padding: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each example, EOS tokens that lengthen the answer that ends it)."""
    lengths, answers = [], []
    for table in dataset.select_columns(["answer_mask"]).with_format("arrow").iter(batch_size=_READ_ROWS):
        masks = table["answer_mask"].combine_chunks()
        lengths.append(masks.value_lengths().to_numpy())
        if answer_padding:
            mask = masks.flatten().to_numpy(zero_copy_only=False)
            ends = np.cumsum(lengths[-1])
            last_other = np.maximum.accumulate(np.where(mask, -1, np.arange(len(mask))))[ends - 1]
            answers.append(ends - 1 - np.maximum(last_other, ends - lengths[-1] - 1))
    length = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    if not answer_padding or not lengths:
        return length, np.zeros_like(length)
    answer = np.concatenate(answers)
    return length, np.where(answer, np.minimum(-answer % answer_padding, max_length - length), 0)


@dataclasses.dataclass(frozen=True)
class _Collate:
    """From the number of a step to its arrays."""

    table: datasets.Dataset
    plan: Batching
    shape: tuple[int, int]
    length_multiple: int
    pad_id: int
    eos_id: int | None
    local_rows: np.ndarray

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(int(step), self.plan.steps_per_epoch)
        rows = self.plan.epoch(epoch)
        first = index * self.plan.rows_per_step
        starts = rows.starts[first : first + self.plan.rows_per_step + 1]
        ids = rows.ids[starts[0] : starts[-1]]
        starts = starts - starts[0]

        accumulation, batch_size = self.shape
        places = (np.arange(accumulation)[:, None] * batch_size + self.local_rows).reshape(-1)
        fields = self._empty(len(places), self._width(ids))
        for row, place in enumerate(places):
            if place < len(starts) - 1:
                self._fill(fields, row, ids, range(starts[place], starts[place + 1]))
        shape = (accumulation, len(self.local_rows))
        if not self.plan.is_packed:
            fields["row_lengths"] = fields["lengths"].max(axis=1)
        return {name: field.reshape(*shape, *field.shape[1:]) for name, field in fields.items()}

    def _width(self, ids: np.ndarray) -> int:
        if self.plan.is_packed:
            return self.plan.row_length
        return -(-int(self.plan.lengths[ids].max()) // self.length_multiple) * self.length_multiple

    def _empty(self, rows: int, width: int) -> dict[str, np.ndarray]:
        kinds = {"answer_mask": (bool, False), "strata": (np.float32, 0), "tokens": (np.int32, self.pad_id)}
        kinds |= {"example_ids": (np.int32, -1)}
        kinds |= dict.fromkeys(("segments", "positions", "lengths", "prompt_lengths"), (np.int32, 0))
        return {name: np.full((rows, width), fill, dtype) for name, (dtype, fill) in kinds.items()}

    def _fill(self, fields: dict[str, np.ndarray], row: int, ids: np.ndarray, places: range) -> None:
        """Puts the examples at `places` of the step, whose examples are `ids`, one behind the other into row `row`."""
        start = shared = self.plan.shared
        examples = ids[places.start : places.stop]
        for segment, (place, text) in enumerate(zip(places, _read_rows(self.table, examples), strict=True), start=1):
            tokens, answer_mask = self._padded(*text, int(ids[place]))
            values = {
                "tokens": tokens,
                "answer_mask": answer_mask,
                "segments": np.full(len(tokens), segment),
                "positions": np.arange(len(tokens)),
                "lengths": np.full(len(tokens), len(tokens)),
                "prompt_lengths": np.full(len(tokens), answer_mask.argmax() if answer_mask.any() else len(tokens)),
                "example_ids": np.full(len(tokens), ids[place]),
                "strata": np.full(len(tokens), place / len(ids)),
            }
            end = start + len(tokens) - shared
            for name, value in values.items():
                fields[name][row, start:end] = value[shared:]
                if segment == 1:
                    fields[name][row, :shared] = value[:shared]
            start = end
        fields["segments"][row, :shared] = SHARED_SEGMENT

    def _padded(self, tokens: np.ndarray, answer_mask: np.ndarray, example: int) -> tuple[np.ndarray, np.ndarray]:
        """The example, with its last answer lengthened by EOS tokens as the plan has it."""
        if not (added := int(self.plan.lengths[example]) - len(tokens)):
            return tokens, answer_mask
        return np.append(tokens, [self.eos_id] * added).astype(np.int32), np.append(answer_mask, [True] * added)


def _read_rows(table: datasets.Dataset, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, answer mask) of the rows `ids`, read in one go."""
    if not len(ids):
        return []
    found: pa.Table = table[[int(i) for i in ids]]
    tokens, answer_mask = found["tokens"].combine_chunks(), found["answer_mask"].combine_chunks()
    ends = np.cumsum(tokens.value_lengths().to_numpy())[:-1]
    return list(
        zip(
            np.split(tokens.flatten().to_numpy(), ends),
            np.split(answer_mask.flatten().to_numpy(zero_copy_only=False), ends),
            strict=True,
        )
    )


def prefetch(dataset: grain.MapDataset, start_step: int = 0, num_threads: int = 2) -> Iterator[dict[str, np.ndarray]]:
    """The elements of `dataset` from `start_step` on, made ahead by `num_threads` threads (0: when asked for)."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset[start_step:].to_iter_dataset(options))


def describe(dataset: datasets.Dataset) -> str:
    """One line: rows, tokens, answer tokens, and the percentiles of the rows' lengths."""
    if not len(dataset):
        return "0 rows"
    lengths, answer_tokens = [], 0
    for table in dataset.with_format("arrow").iter(batch_size=_READ_ROWS):
        lengths.append(table["tokens"].combine_chunks().value_lengths().to_numpy())
        answer_tokens += pa.compute.sum(table["answer_mask"].combine_chunks().flatten()).as_py() or 0
    all_lengths = np.concatenate(lengths)
    p50, p95 = np.percentile(all_lengths, (50, 95))
    return (
        f"{len(dataset):,} rows, {all_lengths.sum():,} tokens ({answer_tokens:,} of answers), lengths: p50 {p50:.0f}, "
        f"p95 {p95:.0f}, longest {all_lengths.max()}"
    )
