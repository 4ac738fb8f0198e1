"""Cases of what people bring, read from `cases/KIND.yaml`: docs/compatibility.md is made of the same table.

A case has `what` (the input in words), `given`, `right` (the right value, in words in `means` where that is not plain)
and `checked` (the library and version that it was checked against).
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

KINDS = ("splits", "rows", "keys", "templates")


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    what: str
    means: str
    checked: str
    given: Any = None
    right: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def cases(kind: str) -> list[Case]:
    """The cases of a kind."""
    text = (Path(__file__).parent / "cases" / f"{kind}.yaml").read_text("utf-8")
    return [Case(**case) for case in yaml.safe_load(text)]


def case_ids(some: list[Case]) -> list[str]:
    """What each case is called in the output of the tests."""
    return [case.what for case in some]
