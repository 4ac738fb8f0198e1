"""Tests that splits depend only on content, and a batch only on its step."""

import itertools
from collections.abc import Callable
from typing import Any

import datasets
import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difflm_jax.data import batches as pipeline
from difflm_jax.data.batches import describe, plan_batches, prefetch, split
from difflm_jax.data.chat import Encoded
from difflm_jax.data.examples import Example, Options
from difflm_jax.data.packing import BatchOptions, BatchPlan
from difflm_jax.data.tokenised import stored_rows, tokenize
from difflm_jax.errors import UserError

PAD, EOS = 9, 7


def dataset_of(rows: list[tuple[list[int], list[bool]]], hashes: list[int] | None = None) -> datasets.Dataset:
    """Returns the data set of rows (tokens, answer mask) in their stored form."""
    examples = [
        Example(Encoded(np.asarray(tokens, np.int32), np.asarray(mask, bool)), hash_, f"f:{i}")
        for i, ((tokens, mask), hash_) in enumerate(zip(rows, hashes or range(len(rows)), strict=True))
    ]
    return stored_rows(examples)


def make(rows: list[tuple[int, int]], hashes: list[int] | None = None) -> datasets.Dataset:
    """Returns rows of (prompt length, answer length); the tokens of row i are 100·i, 100·i + 1, …"""
    tokens = [list(range(100 * i, 100 * i + p + a)) for i, (p, a) in enumerate(rows)]
    return dataset_of([(t, [False] * p + [True] * a) for t, (p, a) in zip(tokens, rows, strict=True)], hashes)


def plan(dataset: datasets.Dataset, **options: Any) -> BatchPlan:
    return plan_batches(dataset, BatchOptions(**options))


def batches(
    dataset: datasets.Dataset, *, epochs: int = 1, strata: str = "step", local_rows: Any = None, **options: Any
) -> grain.MapDataset:
    """Plans and returns the batches of rows."""
    return pipeline.batches(dataset, plan(dataset, **options), epochs=epochs, strata=strata, local_rows=local_rows)


def rows_of(count: int, seed: int = 0) -> datasets.Dataset:
    lengths = np.random.default_rng(seed).integers(1, 20, (count, 2))
    return make([(int(p), int(a)) for p, a in lengths])


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def ids_of(data: Any) -> list[list[int]]:
    """Returns the example ids of every step, without filler rows."""
    return [[int(i) for i in step["example_ids"][step["segments"] * (step["positions"] == 0) > 0]] for step in data]


# --- split


def test_split_follows_content_and_seed_alone() -> None:
    hashes = [int(h) for h in np.random.default_rng(0).integers(-(2**62), 2**62, 1000)]
    train, test = split(make([(1, 1)] * 1000, hashes), 0.2, seed=1)
    assert len(train) + len(test) == 1000
    assert 150 < len(test) < 250
    assert not set(train["content_hash"]) & set(test["content_hash"])
    shuffled = [hashes[i] for i in np.random.default_rng(1).permutation(1000)]
    again = split(make([(1, 1)] * 1000, shuffled), 0.2, seed=1)[1]
    assert set(again["content_hash"]) == set(test["content_hash"])
    half = split(make([(1, 1)] * 500, hashes[:500]), 0.2, seed=1)[1]
    assert set(half["content_hash"]) == set(test["content_hash"]) & set(hashes[:500])
    other = split(make([(1, 1)] * 1000, hashes), 0.2, seed=2)[1]
    assert len(set(other["content_hash"]) & set(test["content_hash"])) < 100


def test_duplicates_are_on_one_side() -> None:
    train, test = split(make([(1, 1)] * 60, [i % 20 for i in range(60)]), 0.3, seed=0)
    assert not set(train["content_hash"]) & set(test["content_hash"])
    assert len(train) % 3 == len(test) % 3 == 0


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=8), st.floats(0.001, 0.999), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_no_side_is_empty(hashes: list[int], test_size: float, seed: int) -> None:
    dataset = make([(1, 1)] * len(hashes), hashes)
    if len(set(hashes)) == 1:
        with pytest.raises(UserError, match="cannot be divided in two"):
            split(dataset, test_size, seed)
    else:
        train, test = split(dataset, test_size, seed)
        assert len(train)
        assert len(test)


def test_split_of_nothing() -> None:
    dataset = make([(1, 1)] * 5)
    train, test = split(dataset, 0, seed=0)
    assert (len(train), len(test)) == (5, 0)
    assert test.column_names == dataset.column_names
    for test_size in (-0.1, 1.0, 2):
        with pytest.raises(UserError, match="is a share of the rows, at least 0 and below 1"):
            split(dataset, test_size, seed=0)


# --- batches


def test_fields_of_a_batch() -> None:
    dataset = make([(2, 3), (4, 0), (1, 6)])
    data = batches(dataset, batch_size=2, accumulation=2, shuffle=False, length_multiple=4, pad_id=PAD, max_length=10)
    assert len(data) == 1
    batch = data[0]
    assert {name: (field.dtype.name, field.shape) for name, field in batch.items()} == {
        "tokens": ("int32", (2, 2, 8)),
        "answer_mask": ("bool", (2, 2, 8)),
        "segments": ("int32", (2, 2, 8)),
        "positions": ("int32", (2, 2, 8)),
        "lengths": ("int32", (2, 2, 8)),
        "prompt_lengths": ("int32", (2, 2, 8)),
        "example_ids": ("int32", (2, 2, 8)),
        "strata": ("float32", (2, 2, 8)),
        "row_lengths": ("int32", (2, 2)),
    }
    assert batch["row_lengths"].tolist() == [[5, 4], [7, 0]]
    # Fields of an example are set at each of its tokens and nowhere else.
    valid = np.arange(8) < np.array([[5, 4], [7, 0]])[..., None]
    np.testing.assert_array_equal(batch["segments"], valid)
    np.testing.assert_array_equal(batch["positions"], np.where(valid, np.arange(8), 0))
    for name, padding, values in (
        ("lengths", 0, [[5, 4], [7, 0]]),
        ("prompt_lengths", 0, [[2, 4], [1, 0]]),
        ("example_ids", -1, [[0, 1], [2, -1]]),
        ("strata", 0, [[0, 1 / 3], [2 / 3, 0]]),
    ):
        np.testing.assert_allclose(batch[name], np.where(valid, np.array(values)[..., None], padding), err_msg=name)
    assert batch["tokens"].tolist() == [
        [[0, 1, 2, 3, 4, 9, 9, 9], [100, 101, 102, 103, 9, 9, 9, 9]],
        [[200, 201, 202, 203, 204, 205, 206, 9], [9] * 8],
    ]
    assert batch["answer_mask"].astype(int).tolist() == [
        [[0, 0, 1, 1, 1, 0, 0, 0], [0] * 8],
        [[0, 1, 1, 1, 1, 1, 1, 0], [0] * 8],
    ]


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_batches_hold_the_same_examples_however_they_are_arranged(batching: str) -> None:
    """Packed rows are as wide as `max_length`; they have examples one after another, unchanged."""
    options = {"epochs": 2, "seed": 3, "max_length": 40, "length_multiple": 16, "answer_padding": 3, "eos_id": EOS}

    unlike = ("strata", "row_lengths")

    def examples(data: Any) -> list[dict[str, bytes]]:
        found = []
        for step in data:
            rows = {name: field.reshape(-1, field.shape[-1]) for name, field in step.items() if name not in unlike}
            for row, segments in enumerate(rows.pop("segments")):
                for number in range(1, segments.max() + 1):
                    at = np.flatnonzero(segments == number)
                    assert (np.diff(at) == 1).all()
                    found.append({name: field[row, at].tobytes() for name, field in rows.items()})
        return sorted(found, key=lambda example: (example["example_ids"], example["tokens"]))

    alone = batches(rows_of(50), batch_size=4, **options)
    arranged = batches(rows_of(50), batch_size=4, batching=batching, **options)
    assert examples(arranged) == examples(alone)
    if batching == "packed":
        assert len(arranged) < len(alone)
        assert {step["tokens"].shape[-1] for step in arranged} == {48}
        share = np.mean([(step["segments"] > 0).mean() for step in arranged if (step["segments"] > 0).any(-1).all()])
        assert share > 0.9
    for step in arranged:
        at_starts = step["segments"] * (step["positions"] == 0) > 0
        strata = step["strata"][at_starts]
        np.testing.assert_allclose(np.sort(strata), np.arange(len(strata)) / len(strata), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 50])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_example_once(count: int, shuffle: bool) -> None:
    data = batches(rows_of(count), batch_size=4, accumulation=2, epochs=3, shuffle=shuffle, max_length=64)
    per_epoch = -(-count // 8)
    assert len(data) == 3 * per_epoch
    steps = ids_of(data)
    epochs = [list(itertools.chain(*steps[e * per_epoch : (e + 1) * per_epoch])) for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count == 50:
        assert len({tuple(epoch) for epoch in epochs}) == (3 if shuffle else 1)
    if not shuffle:
        assert epochs[0] == list(range(count))


def test_seeds_share_no_permutation() -> None:
    orders = set()
    for seed in range(4):
        steps = ids_of(batches(rows_of(50), batch_size=50, epochs=4, seed=seed, max_length=64))
        orders |= {tuple(step) for step in steps}
    assert len(orders) == 16


def test_a_batch_is_a_function_of_its_step() -> None:
    def data() -> Any:
        return batches(rows_of(50), batch_size=4, accumulation=2, epochs=2, seed=3, max_length=64)

    forward, backward = data(), data()
    steps = range(len(forward))
    there = [forward[step] for step in steps]
    back = {step: backward[step] for step in reversed(steps)}
    for step in steps:
        assert_same(there[step], back[step])


@pytest.mark.parametrize("num_threads", [0, 3])
def test_prefetching_starts_anywhere(num_threads: int) -> None:
    data = batches(rows_of(50), batch_size=4, epochs=2, seed=3, max_length=64)
    for start in (0, 1, 12, 13, len(data) - 1, len(data)):
        ahead = list(prefetch(data, start, num_threads))
        assert len(ahead) == len(data) - start
        for offset, batch in enumerate(ahead):
            assert_same(batch, data[start + offset])


@pytest.mark.parametrize(("accumulation", "batch_size"), [(8, 1), (4, 2), (2, 4)])
def test_accumulation_changes_the_shape_alone(accumulation: int, batch_size: int) -> None:
    options = {"epochs": 2, "seed": 5, "max_length": 64, "answer_padding": 8, "eos_id": EOS}
    whole = batches(rows_of(21), batch_size=8, **options)
    parts = batches(rows_of(21), batch_size=batch_size, accumulation=accumulation, **options)
    assert len(whole) == len(parts)
    for a, b in zip(whole, parts, strict=True):
        assert b["tokens"].shape[:2] == (accumulation, batch_size)
        assert_same(a, {name: field.reshape(1, 8, *field.shape[2:]) for name, field in b.items()})


def test_length_follows_the_longest_row_of_the_step() -> None:
    data = batches(make([(1, 2), (3, 61), (3, 62), (0, 5)]), batch_size=1, shuffle=False, max_length=100)
    assert [step["tokens"].shape[-1] for step in data] == [64, 64, 128, 64]
    with pytest.raises(ValueError, match="a row of 65 tokens was not made for max_length=64"):
        batches(make([(3, 62)]), batch_size=1, max_length=64)[0]


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_answer_padding(mask: list[bool], multiple: int, slack: int) -> None:
    dataset = dataset_of([(list(range(len(mask))), mask)])
    max_length = len(mask) + slack
    batch = batches(dataset, batch_size=1, answer_padding=multiple, eos_id=EOS, max_length=max_length)[0]
    length = int(batch["lengths"][0, 0, 0])
    tokens, marked = batch["tokens"][0, 0, :length].tolist(), batch["answer_mask"][0, 0, :length].tolist()
    added = length - len(mask)
    assert tokens == list(range(len(mask))) + [EOS] * added
    assert marked == mask + [True] * added
    assert not batch["answer_mask"][0, 0, length:].any()
    last = len(mask) - (mask[::-1].index(False) if False in mask else len(mask))  # where the last answer begins
    if not mask[-1]:
        assert added == 0
    elif length < max_length:
        assert (length - last) % multiple == 0
        assert added < multiple
    else:
        assert added == min(slack, -(len(mask) - last) % multiple)


def test_wrong_options() -> None:
    for key in ("batch_size", "accumulation", "epochs"):
        with pytest.raises(UserError, match=f"{key}=0: must be at least 1"):
            batches(rows_of(3), **({"batch_size": 1, "max_length": 64} | {key: 0}))
    with pytest.raises(UserError, match="needs a tokenizer with an EOS token"):
        batches(rows_of(3), batch_size=1, answer_padding=4, max_length=64)


def test_no_rows_no_steps() -> None:
    data = batches(rows_of(3).select([]), batch_size=2, max_length=64)
    assert len(data) == 0
    assert list(prefetch(data)) == []


def test_describe() -> None:
    dataset = make([(10, 90), (5, 5), (20, 0)])
    assert describe(dataset) == "3 rows, 130 tokens (95 of answers), lengths: p50 20, p95 92, longest 100"
    assert describe(dataset.select([2])) == "1 rows, 20 tokens (0 of answers), lengths: p50 20, p95 20, longest 20"
    assert describe(dataset.select([])) == "0 rows"


def test_from_file_to_batch(jsonl: Callable[..., str], tokenizer: Any, tmp_path: Any) -> None:
    """Rows that were written, split and shuffled come out of the batches unchanged."""
    rows = [{"question": f"{i}?", "answer": f"Number {i}."} for i in range(40)]
    dataset = tokenize(jsonl(rows), tokenizer, Options("sft", 64), tmp_path / "cache")
    train, test = split(dataset, 0.25, seed=0)
    seen = set()
    for part in (train, test):
        for step in batches(part, batch_size=3, accumulation=2, pad_id=PAD, max_length=64):
            for tokens, mask, example in zip(
                step["tokens"].reshape(6, -1),
                step["answer_mask"].reshape(6, -1),
                step["example_ids"].reshape(6, -1)[:, 0],
                strict=True,
            ):
                if example >= 0:
                    answer = tokenizer.decode(tokens[mask])
                    line = int(part[int(example)]["origin"].rpartition(":")[2])
                    assert answer == f"Number {line - 1}.<|im_end|>"
                    seen.add(answer)
    assert len(seen) == 40


@pytest.mark.parametrize("answer_padding", [0, 4])
@pytest.mark.parametrize("batching", ["rows", "packed", "shared"])
def test_the_rows_of_a_process_are_those_of_the_whole_batch(tokenizer, jsonl, tmp_path, answer_padding, batching):
    """Each process reads only its own rows. They are padded to the longest of all, which it may not have read."""
    rows = [{"question": "q" * (3 * i + 1), "answer": "a" * (i % 5 + 1)} for i in range(11)]
    table = tokenize(jsonl(rows), tokenizer, Options("sft", 64), tmp_path)
    options = {"batch_size": 4, "accumulation": 2, "length_multiple": 1, "max_length": 64, "batching": batching}
    options |= {"answer_padding": answer_padding, "eos_id": tokenizer.eos_token_id}
    whole = batches(table, **options)
    parts = [batches(table, **options, local_rows=np.array(own)) for own in ([0, 1], [2, 3])]
    for step in range(len(whole)):
        for name, field in whole[step].items():
            joined = np.concatenate([part[step][name] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, field, err_msg=name)
