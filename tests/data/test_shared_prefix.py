"""Tests that the common prefix of all prompts is found exactly and occurs once in a packed row."""

import datasets
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from difflm_jax.data.fields import SHARED_SEGMENT
from difflm_jax.data.shared_prefix import shared_prefix
from tests.data.test_batches import batches, make, plan

EOS = 7


def with_prefix(prefix: list[int], rows: list[tuple[int, int]]) -> datasets.Dataset:
    """Returns rows of (prompt length after the prefix, answer length)."""
    dataset = make([(len(prefix) + prompt, answer) for prompt, answer in rows])
    tokens = [prefix + [t + 1000 for t in row["tokens"][len(prefix) :]] for row in dataset]
    return dataset.remove_columns("tokens").add_column("tokens", tokens, feature=dataset.features["tokens"])


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(0, 3)), min_size=1, max_size=6)
)
@settings(max_examples=100, deadline=None)
def test_it_is_the_longest_common_beginning_short_of_the_end_of_every_prompt(rows) -> None:
    """Compares with the definition, token by token."""
    dataset = make([(len(prompt), answer) for prompt, answer in rows])
    tokens = [prompt + [1] * answer for prompt, answer in rows]
    feature = dataset.features["tokens"]
    dataset = dataset.remove_columns("tokens").add_column("tokens", tokens, feature=feature)
    expected = 0
    while all(len(p) - 1 > expected for p, _ in rows) and len({row[expected] for row in tokens}) == 1:
        expected += 1
    assert shared_prefix(dataset) == expected


def test_of_no_rows_nothing_is_shared() -> None:
    assert shared_prefix(make([])) == 0


def test_rows_hold_it_once_and_the_rest_of_each_example() -> None:
    lengths = np.random.default_rng(0).integers(2, 9, (40, 2))
    dataset = with_prefix([5, 4, 3, 2, 1, 6], [(int(p), int(a)) for p, a in lengths])
    options = {"seed": 3, "max_length": 50, "length_multiple": 1, "answer_padding": 3, "eos_id": EOS}

    unlike = ("strata", "row_lengths")

    def examples(batching: str) -> dict[int, dict[str, list]]:
        found = {}
        for step in batches(dataset, batch_size=2, batching=batching, **options):
            rows = {name: field.reshape(-1, field.shape[-1]) for name, field in step.items() if name not in unlike}
            for row, segments in enumerate(rows["segments"]):
                shared = np.flatnonzero(segments == SHARED_SEGMENT)
                for number in range(1, segments.max() + 1):
                    at = np.concatenate([shared, np.flatnonzero(segments == number)])
                    example = {name: field[row, at].tolist() for name, field in rows.items()}
                    number = example.pop("example_ids")[-1]
                    for name in ("segments", "lengths", "prompt_lengths"):  # at a shared token: those of one example
                        example[name] = set(example[name][len(shared) :])
                    example["segments"] = None
                    found[number] = example
        return found

    assert examples("shared") == examples("rows")
    plans = {name: plan(dataset, batch_size=2, batching=name, **options) for name in ("shared", "packed")}
    assert plans["shared"].shared == 6
    assert plans["shared"].epoch(0).num_rows < plans["packed"].epoch(0).num_rows
    places = [step["segments"] for step in batches(dataset, batch_size=1, batching="shared", **options)]
    assert plans["shared"].real_share == np.mean([field != 0 for field in places])
