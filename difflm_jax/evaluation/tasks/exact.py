"""Rows of any format that training accepts. The last answer is the reference."""

import re
from typing import Any

from difflm_jax.data.columns import KNOWN_NAMES, Naming
from difflm_jax.data.formats import Conversation, parse_row
from difflm_jax.data.keys import Notes
from difflm_jax.data.rows import RowError
from difflm_jax.evaluation.tasks.question import Question


def question(row: Any, naming: Naming = KNOWN_NAMES, notes: Notes | None = None) -> Question:
    """Builds a question from a conversation up to its last answer. `naming` and `notes` are as in `parse_row`."""
    _, parsed = parse_row(row, naming, notes)
    if not isinstance(parsed, Conversation) or parsed.messages[-1]["role"] != "assistant":
        raise RowError("the row has no answer to compare with")
    if len(parsed.messages) == 1:
        raise RowError("no turn precedes the answer")
    answer = parsed.messages[-1]["content"]
    if not answer.strip():
        raise RowError("its answer has no text to compare with")
    arguments = dict(parsed.template_arguments) or None
    return Question(list(parsed.messages[:-1]), answer, tools=parsed.tools, template_arguments=arguments)


def normalised(text: str) -> str:
    """Returns `text` as exact match compares it: lower case, single spaces, no leading thoughts, no final period."""
    text = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    return " ".join(text.lower().split()).removesuffix(".")


def is_correct(question: Question, text: str) -> bool:
    """Whether the whole answer is the reference."""
    return normalised(text) == normalised(question.reference)


def contains(question: Question, text: str) -> bool:
    """Whether the reference occurs in the answer as whole words."""
    wanted, found = normalised(question.reference), normalised(text)
    padded = "".join(c if c.isalnum() else " " for c in found).split()
    words = "".join(c if c.isalnum() else " " for c in wanted).split()
    return bool(words) and any(padded[i : i + len(words)] == words for i in range(len(padded)))
