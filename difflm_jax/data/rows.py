"""What a source yields: rows that are not parsed yet, each with its origin."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from difflm_jax.errors import UserError


class RowError(UserError):
    """What is wrong with one row; whoever knows the row's origin adds it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that is not parsed yet: `load()` returns its value or raises `RowError`.

    `origin` is 'file:line', 'file[index]' or 'hubid[index]'. `continues`: the text continues in the next row, so no
    document ends here. `continued`: it began in an earlier row.
    """

    origin: str
    load: Callable[[], Any]
    continues: bool = False
    continued: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that was found: `rows()` streams it from the start; `fingerprint` changes with its contents."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[Row]]
