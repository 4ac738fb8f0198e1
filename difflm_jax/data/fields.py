"""The fields of a batch: one table, used by the pipeline to fill batches and by `diffusion.corruption` for its struct.

Values that belong to an example are stored at each of its tokens, so a row can hold any number of examples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SHARED_SEGMENT = -1  # in `segments`: tokens that every example of the row begins with, stored once


@dataclasses.dataclass(frozen=True)
class PlacedExample:
    """An example with its place in a batch."""

    tokens: np.ndarray  # [n] int32
    answer_mask: np.ndarray  # [n] bool
    prompt_length: int
    segment: int
    example_id: int
    stratum: float


class Field(NamedTuple):
    """An array [B, L] of a batch: its dtype, its value at padding, and its values at the tokens of an example."""

    dtype: type[np.generic]
    padding: int
    of_example: Callable[[PlacedExample], Any]


FIELDS = {
    "tokens": Field(np.int32, 0, lambda e: e.tokens),  # padding is the tokenizer's, if it has one
    "answer_mask": Field(np.bool_, 0, lambda e: e.answer_mask),
    # Number of the example in its row, from 1; 0: padding; SHARED_SEGMENT: begins all examples of the row.
    "segments": Field(np.int32, 0, lambda e: e.segment),
    "positions": Field(np.int32, 0, lambda e: np.arange(len(e.tokens))),  # place of the token in its example
    "lengths": Field(np.int32, 0, lambda e: len(e.tokens)),  # tokens of the example
    # Index of the example's first answer token, or its length if it has none.
    "prompt_lengths": Field(np.int32, 0, lambda e: e.prompt_length),
    "example_ids": Field(np.int32, -1, lambda e: e.example_id),  # index in the data set
    "strata": Field(np.float32, 0, lambda e: e.stratum),  # in [0, 1): place of the example among those of the step
}
# One more field [B]: the number of real tokens of each row. It is absent if rows hold several examples.
ROW_LENGTHS = "row_lengths"


def empty_rows(rows: int, width: int, pad_id: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch of `rows` rows, all padding."""
    batch = {name: np.full((rows, width), field.padding, field.dtype) for name, field in FIELDS.items()}
    batch["tokens"][:] = pad_id
    return batch


def put_example(batch: dict[str, np.ndarray], row: int, columns: slice, example: PlacedExample, part: slice) -> None:
    """Writes the tokens `part` of `example`, and their other fields, into `columns` of row `row`."""
    for name, field in FIELDS.items():
        batch[name][row, columns] = np.broadcast_to(field.of_example(example), len(example.tokens))[part]
