"""Cases of user data, read from `cases/KIND.yaml`. docs/compatibility.md is generated from the same tables.

A case has `what` (the input in words), `given`, `right` (the expected value, explained in `means` if needed)
and `checked` (the library and version that it was checked against).
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from difflm_jax.data.formats import FORMATS
from difflm_jax.data.keys import MESSAGE_KEYS, ROW_KEYS


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
    """Returns the cases of a kind."""
    text = (Path(__file__).parent / "cases" / f"{kind}.yaml").read_text("utf-8")
    return [Case(**case) for case in yaml.safe_load(text)]


def case_ids(some: list[Case]) -> list[str]:
    """Returns the name of each case in the output of the tests."""
    return [case.what for case in some]


_TITLES = {
    "splits": "Folders and splits",
    "rows": "Rows",
    "templates": "Chat templates",
    "adapters": "PEFT adapters",
}
_HEAD = """# Compatibility

What the readers make of the files, rows, chat templates and adapters that people bring. Every line is a test
(`test_splits.py`, `test_rows.py` and `test_templates.py` of `tests/data`, `tests/checkpoint/test_peft_merged.py`); the
last column names the library or data set, with its version, that the right value was checked against. This page is made
by `python -m tests.data.cases`.

A key of a row or message that has a value is *used*, *announced* (in the line that sums up a data set, with the number
of rows), or its row is *refused* by name. A key that is not listed here is announced.
"""


def markdown() -> str:
    """Returns the text of docs/compatibility.md."""
    parts = [_HEAD]
    for kind, title in _TITLES.items():
        lines = [f"| {case.what} | {case.means} | {case.checked} |" for case in cases(kind)]
        parts.append(
            "\n".join([f"## {title}", "", "| input | right value | checked against |", "|---|---|---|", *lines])
        )
    formats = [f"| {', '.join(f'`{key}`' for key in format.needed)} | {_link(format.source)} |" for format in FORMATS]
    parts.append("\n".join(["## Keys that make a format", "", _FIRST, "", "| keys | source |", "|---|---|", *formats]))
    for title, table in (("Other keys of a row", ROW_KEYS), ("Keys of a message", MESSAGE_KEYS)):
        lines = [f"| `{key}` | {known.use} | {known.effect} | {_link(known.source)} |" for key, known in table.items()]
        parts.append(
            "\n".join([f"## {title}", "", "| key | use | what it does | source |", "|---|---|---|---|", *lines])
        )
    return "\n\n".join(part.strip() for part in parts) + "\n"


_FIRST = "The first whose keys have values is that of a row. Other names are mapped by `data.columns`."


def _link(sources: str) -> str:
    return ", ".join(f"[{source.removeprefix('https://').split('/')[0]}]({source})" for source in sources.split(", "))


if __name__ == "__main__":
    print(markdown(), end="")
