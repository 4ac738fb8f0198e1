"""Grade-school mathematics (GSM8K, arXiv:2110.14168): the final number counts."""

import re
from fractions import Fraction
from typing import Any

from difflm_jax.data.sources import RowError
from difflm_jax.evaluation.tasks.question import Question, ask, text_field

_NUMBER = r"[-−]?\s*\$?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
# A sign right behind a word, a number or a bracket stands between two numbers, as in 3-2.
_LAST = r"(?:(?<![\w.)\]$])[-−]\s*)?\$?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKS = (rf"####\s*({_NUMBER})", rf"\\boxed\{{\s*\\?\s*({_NUMBER})")


def question(row: Any) -> Question:
    """`question`, and `answer` whose last line is `#### number`."""
    answer = text_field(row, "answer")
    if "####" not in answer or final_number(answer) is None:
        raise RowError("its answer has no '#### number'")
    return Question(ask(text_field(row, "question")), answer, row)


def final_number(text: str) -> Fraction | None:
    """The number behind the last `####`, else in the last `\\boxed{}`, else the last one of the text."""
    for pattern in _MARKS:
        if found := re.findall(pattern, text):
            return _value(found[-1])
    found = re.findall(_LAST, text)
    return _value(found[-1]) if found else None


def is_correct(question: Question, text: str) -> bool:
    """The final numbers are equal."""
    found = final_number(text)
    return found is not None and found == final_number(question.reference)


def _value(number: str) -> Fraction | None:
    digits = re.sub(r"[\s$,]", "", number).replace("−", "-")
    return Fraction(digits) if len(digits) <= 64 else None
