"""Tasks with verifiable answers: a row of data becomes a question, and a generated text is right or wrong.

A task is one file with `question(row) -> Question` and `is_correct(question, text) -> bool`, and a line in `TASKS`.
Nothing here depends on a model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from difflm_jax.data.columns import KNOWN_NAMES, Naming
from difflm_jax.data.keys import Notes, announcement
from difflm_jax.data.sources import Row, RowError, open_source
from difflm_jax.errors import UserError
from difflm_jax.evaluation.tasks import countdown, exact, gsm8k, sudoku
from difflm_jax.evaluation.tasks.question import Question

__all__ = ["TASKS", "Question", "Task", "read_questions"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    question: turns a row into a question; raises `RowError` if it cannot. is_correct: whether a text is a right answer.
    has_answers: rows are in a format that training accepts, with an answer that can be masked and scored.
    """

    question: Callable[[Any], Question]
    is_correct: Callable[[Question, str], bool]
    has_answers: bool = False


TASKS = {
    "exact": Task(exact.question, exact.is_correct, has_answers=True),
    "contains": Task(exact.question, exact.contains, has_answers=True),
    "gsm8k": Task(gsm8k.question, gsm8k.is_correct, has_answers=True),
    "countdown": Task(countdown.question, countdown.is_correct),
    "sudoku": Task(sudoku.question, sudoku.is_correct),
}


def _renamed(read: Callable[[Any], Question], naming: Naming, row: Any) -> Question:
    return read(naming.rename(row) if isinstance(row, Mapping) else row)


def _other_task(row: Row, task: str) -> str:
    """Returns a hint for a row that `task` cannot use: the flag, and the tasks for chat rows if it is one."""
    if TASKS[task].question is exact.question:
        return ""
    try:
        exact.question(row.load())
    except RowError:
        return f" (--task={task})"
    return f" (--task={task}; rows like this one are scored by --task=exact or --task=contains)"


def read_questions(dataset: str, rows: int = 0, task: str = "exact", naming: Naming = KNOWN_NAMES) -> list[Question]:
    """Reads the first `rows` (0: all) questions of a data set, and prints which keys of its rows are not used.

    naming: the data set's own names of columns and roles. Raises `UserError` that names the first bad row.
    """
    questions = []
    notes = Notes()
    read = TASKS[task].question
    if read is exact.question:
        read = functools.partial(exact.question, naming=naming, notes=notes)
    elif naming.columns:
        read = functools.partial(_renamed, read, naming)
    for row in open_source(dataset).rows():
        try:
            questions.append(dataclasses.replace(read(row.load()), origin=row.origin))
        except RowError as error:
            raise UserError(f"{row.origin}: {error}{_other_task(row, task)}") from error
        if len(questions) == rows:
            break
    if notes:
        print(f"data: {dataset}: {announcement(notes)}", flush=True)
    return questions
