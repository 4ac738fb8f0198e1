"""Tests plans of packed rows: every example once, little waste, a function of lengths, seed and epoch only."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difflm_jax.data.formats import parse_row
from difflm_jax.data.packing import BATCHING, BatchOptions, BatchPlan, best_fit
from difflm_jax.data.sources import open_source
from difflm_jax.errors import UserError

LENGTHS = np.random.default_rng(0).integers(5, 200, 500)


def plan(kind="packed", lengths=LENGTHS, row_length=256, seed=0, shuffle=True) -> BatchPlan:
    options = BatchOptions(8, row_length, batching=kind, length_multiple=1, seed=seed, shuffle=shuffle)
    return BatchPlan(lengths, options)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
@settings(max_examples=100, deadline=None)
def test_best_fit_takes_the_fullest_row_that_has_room(lengths: list[int], capacity: int) -> None:
    """Compares with the definition, row by row."""
    used: list[int] = []
    for length, row in zip(lengths, best_fit(np.array(lengths, int), capacity), strict=True):
        fitting = [used[r] for r in range(len(used)) if used[r] + length <= capacity]
        if row == len(used):
            assert not fitting
            used.append(length)
        else:
            assert used[row] == max(fitting)
            used[row] += length


def test_what_does_not_fit_is_no_row() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit into rows of 8"):
        best_fit(np.array([9]), 8)


@pytest.mark.parametrize("kind", BATCHING)
def test_an_epoch_holds_every_example_once_and_epochs_differ(kind: str) -> None:
    batching = plan(kind)
    epochs = [batching.epoch(i) for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch.ids) == list(range(len(LENGTHS)))
        assert epoch.num_rows == epochs[0].num_rows
    assert len({tuple(epoch.ids) for epoch in epochs}) == 3
    np.testing.assert_array_equal(plan(kind).epoch(1).ids, epochs[1].ids)
    assert (plan(kind, seed=1).epoch(0).ids != epochs[0].ids).any()
    fixed = plan(kind, shuffle=False)
    np.testing.assert_array_equal(fixed.epoch(0).ids, fixed.epoch(1).ids)


def test_packed_rows_are_full_and_never_too_long() -> None:
    batching = plan()
    epoch = batching.epoch(0)
    lengths = np.add.reduceat(LENGTHS[epoch.ids], epoch.starts[:-1])
    assert lengths.max() <= 256
    assert batching.real_share == pytest.approx(LENGTHS.sum() / (256 * epoch.num_rows))
    assert batching.real_share > 0.97
    assert batching.real_share > plan("grouped").real_share > plan("rows").real_share + 0.1


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "gsm8k_train.jsonl"])
def test_packed_chat_data_is_real_tokens_to_97_percent(shared_data, name: str) -> None:
    """Tokens are counted as words here, since only the spread of lengths matters for packing."""
    texts = []
    for row in open_source(str(shared_data / "chat" / name)).rows():
        _, content = parse_row(row.load())
        texts.append(" ".join(message["content"] or "" for message in content.messages))
    lengths = np.clip([len(text.split()) for text in texts], 1, 768)
    assert plan(lengths=np.array(lengths), row_length=768).real_share >= 0.97


def test_packed_rows_may_be_as_wide_as_a_few_examples() -> None:
    """At least the longest example fits, and no row is wider than `max_length`."""
    options = BatchOptions(1, 512, batching="shared", length_multiple=1, row_examples=8)
    lengths = np.random.default_rng(0).integers(50, 61, 80)
    fitted = options.fitted(lengths, shared=30)
    assert fitted.row_length == 30 + math.ceil(8 * (lengths.mean() - 30))
    assert 10 <= BatchPlan(lengths, fitted, shared=30).epoch(0).num_rows <= 12
    assert options.fitted(np.array([5] * 20 + [300]), 0).row_length == 300
    assert options.fitted(np.full(9, 200), 0).row_length == 512
    assert dataclasses.replace(options, row_examples=0).fitted(lengths, 30).row_length == 512


def test_grouped_steps_hold_rows_of_like_length() -> None:
    batching = plan("grouped")
    epoch = batching.epoch(0)
    steps = np.array_split(LENGTHS[epoch.ids[:496]], 62)
    spread = np.mean([step.max() - step.min() for step in steps])
    assert spread < 10
    assert abs(np.corrcoef(np.arange(62), [step.mean() for step in steps])[0, 1]) < 0.5  # steps are in random order


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="batching='bins': must be one of rows, grouped, packed"):
        plan("bins")
