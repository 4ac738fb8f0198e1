"""Tables in a terminal or a log."""

import sys
from collections.abc import Iterable, Sequence

LOG_WIDTH = 240  # columns without a terminal: wide enough that no line of a table breaks


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, gap: int = 3) -> None:
    """Prints rows of text under `columns`: the first `left` columns aligned to the left, the others to the right.

    `gap` is the space between two columns, at least 1.
    """
    from rich import box  # slow to import, and most commands print no table
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap - 2 if gap > 2 else 0, 0, min(gap, 2) - 1))
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as text, because the brackets of an interval are not markup
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip().removeprefix(" ") for line in captured.get().splitlines()), flush=True)
