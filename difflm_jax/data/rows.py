"""Sources and the unparsed rows that they yield, each with its origin."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from difflm_jax.errors import UserError


class RowError(UserError):
    """An error in one row. The caller that knows the row's origin adds it to the message."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An unparsed row: `load()` returns its value or raises `RowError`.

    `origin` is 'file:line', 'file[index]' or 'hubid[index]'. `continues`: the text continues in the next row, so no
    document ends here. `continued`: the text began in an earlier row.
    """

    origin: str
    load: Callable[[], Any]
    continues: bool = False
    continued: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened data set: `rows()` streams it from the start; `fingerprint` changes with its contents."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[Row]]
