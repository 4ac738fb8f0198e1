"""4 x 4 Sudoku (the test set of d1, arXiv:2504.12216): every row, column and quarter of the grid has 1 to 4."""

import re
from typing import Any

from difflm_jax.data.sources import RowError
from difflm_jax.evaluation.tasks.question import Question, ask, text_field

_SIZE = 4


def question(row: Any) -> Question:
    """Builds a question from `Puzzle` and `Solution`: 16 digits each, row by row; 0 is an empty cell."""
    puzzle, solution = (text_field(row, name).strip() for name in ("Puzzle", "Solution"))
    for name, grid, digits in (("Puzzle", puzzle, "0-4"), ("Solution", solution, "1-4")):
        if not re.fullmatch(f"[{digits}]{{{_SIZE**2}}}", grid):
            raise RowError(f"its {name!r} is not {_SIZE**2} digits {digits}")
    prompt = (
        "Fill in this 4x4 Sudoku so that every row, column and 2x2 quarter holds 1, 2, 3 and 4; 0 is an empty cell. "
        f"Write the four rows of the solution alone.\n{_lines(puzzle)}"
    )
    return Question(ask(prompt), _lines(solution), row)


def is_correct(question: Question, text: str) -> bool:
    """Whether the last 16 digits of the marked answer, or of the text, are a valid grid that keeps the given cells."""
    marked = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.DOTALL)
    digits = "".join(re.findall(r"\d", marked[-1] if marked else text))[-(_SIZE**2) :]
    puzzle = question.row["Puzzle"].strip()
    kept = len(digits) == _SIZE**2 and all(given in ("0", cell) for given, cell in zip(puzzle, digits, strict=True))
    return kept and all(sorted(group) == list("1234") for group in _groups(digits))


def _groups(grid: str) -> list[str]:
    """Returns the rows, columns and quarters of a grid."""
    rows = [grid[i : i + _SIZE] for i in range(0, _SIZE**2, _SIZE)]
    quarters = [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
    return [*rows, *("".join(column) for column in zip(*rows, strict=True)), *quarters]


def _lines(grid: str) -> str:
    return "\n".join(" ".join(grid[i : i + _SIZE]) for i in range(0, _SIZE**2, _SIZE))
