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

from difflm_jax.data.tokenised import tokenize
from difflm_jax.errors import UserError

__all__ = ["batches", "describe", "prefetch", "split", "tokenize"]

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
    length_multiple: int = 64,
    pad_id: int = 0,
    answer_padding: int = 0,
    eos_id: int | None = None,
    max_length: int,
    local_rows: np.ndarray | None = None,
) -> grain.MapDataset:
    """The batches of a run: element `step` is what one optimiser step needs, whole, for all devices.

    An element is a dict of arrays over A = `accumulation` micro-batches of B = `batch_size` rows, padded on the right
    with `pad_id` to L, the step's longest row rounded up to `length_multiple`:
      tokens [A, B, L] int32; lengths [A, B] int32, 0 for a filler row; answer_mask [A, B, L] bool;
      prompt_lengths [A, B] int32, index of the first answer token, or the length if there is none;
      example_ids [A, B] int32, index in `dataset`, -1 for a filler row; row_index [A, B] int32, place in the step.

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
        (accumulation, batch_size),
        length_multiple,
        pad_id,
        answer_padding,
        eos_id,
        max_length,
        np.arange(batch_size) if local_rows is None else local_rows,
        dataset.select_columns(["answer_mask"]).with_format("arrow"),
    )
    ids = grain.MapDataset.range(len(dataset))
    if shuffle:  # grain adds the epoch to the seed, so seeds are spread first: 0 and 1 must not share permutations
        ids = ids.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    return ids.batch(accumulation * batch_size).repeat(epochs).map(collate)


@dataclasses.dataclass(frozen=True)
class _Collate:
    """From the indices of a step's rows to its arrays."""

    table: datasets.Dataset
    shape: tuple[int, int]
    length_multiple: int
    pad_id: int
    answer_padding: int
    eos_id: int | None
    max_length: int
    local_rows: np.ndarray
    answer_masks: datasets.Dataset

    def __call__(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        accumulation, batch_size = self.shape
        places = (np.arange(accumulation)[:, None] * batch_size + self.local_rows).reshape(-1)
        own = places[places < len(ids)]
        rows = [self._padded(*row) for row in _read_rows(self.table, ids[own])] if len(own) else []
        length = -(-self._longest(ids) // self.length_multiple) * self.length_multiple
        tokens = np.full((len(places), length), self.pad_id, np.int32)
        answer_mask = np.zeros((len(places), length), bool)
        lengths = np.zeros(len(places), np.int32)
        example_ids = np.full(len(places), -1, np.int32)
        for (i, place), (row_tokens, row_mask) in zip(
            ((i, place) for i, place in enumerate(places) if place < len(ids)), rows, strict=True
        ):
            lengths[i] = len(row_tokens)
            tokens[i, : lengths[i]] = row_tokens
            answer_mask[i, : lengths[i]] = row_mask
            example_ids[i] = ids[place]
        fields = {
            "tokens": tokens,
            "lengths": lengths,
            "answer_mask": answer_mask,
            "prompt_lengths": np.where(answer_mask.any(1), answer_mask.argmax(1), lengths).astype(np.int32),
            "example_ids": example_ids,
            "row_index": places.astype(np.int32),
        }
        shape = (accumulation, len(self.local_rows))
        return {name: field.reshape(*shape, *field.shape[1:]) for name, field in fields.items()}

    def _longest(self, ids: np.ndarray) -> int:
        """The longest row of the whole step, as it is padded: of the rows of others only their masks are read."""
        masks = self.answer_masks[[int(i) for i in ids]]["answer_mask"].combine_chunks()
        lengths = masks.value_lengths().to_numpy()
        if not self.answer_padding:
            return int(lengths.max())
        parts = np.split(masks.flatten().to_numpy(zero_copy_only=False), np.cumsum(lengths)[:-1])
        return max(len(part) + self._added(part) for part in parts)

    def _padded(self, tokens: np.ndarray, answer_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row, with its last answer lengthened by EOS tokens if that is wanted."""
        if len(tokens) > self.max_length:
            raise ValueError(f"a row of {len(tokens)} tokens was not made for max_length={self.max_length}")
        if not (added := self._added(answer_mask)):
            return tokens, answer_mask
        return np.append(tokens, [self.eos_id] * added).astype(np.int32), np.append(answer_mask, [True] * added)

    def _added(self, answer_mask: np.ndarray) -> int:
        """How many EOS tokens lengthen the answer that ends a row."""
        if not self.answer_padding or not answer_mask[-1]:
            return 0
        others = np.flatnonzero(~answer_mask)
        answer_length = len(answer_mask) - (others[-1] + 1 if len(others) else 0)
        return min(-answer_length % self.answer_padding, self.max_length - len(answer_mask))


def _read_rows(table: datasets.Dataset, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, answer mask) of the rows `ids`, read in one go."""
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
