"""Grade-school mathematics (GSM8K, arXiv:2110.14168), scored by the final number."""

import re
from fractions import Fraction
from typing import Any

from difflm_jax.data.sources import RowError
from difflm_jax.evaluation.tasks.question import Question, ask, text_field

# Matches 9,500 and 1,00,000 but not 5,7. A minus after a word, a number or a bracket is not a sign, as in 3-2.
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?:(?<![\w.)\]}}$])-\s*)?)\$?\s*({_DIGITS})(?:\s*/\s*({_DIGITS}))?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}")
_GROUPING = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ]|\{?,\\!\}?|[\u00a0\u2009\u202f])(?=\d{3})")  # LaTeX and thin spaces
_LONGEST = 64  # characters of the longest number


def question(row: Any) -> Question:
    """Builds a question from `question` and `answer`, whose last line is `#### number`."""
    answer = text_field(row, "answer")
    if "####" not in answer or final_number(answer) is None:
        raise RowError("its answer has no '#### number'")
    return Question(ask(text_field(row, "question")), answer, row)


def final_number(text: str) -> Fraction | None:
    r"""Returns the number after the last `####`, else the last in the last `\boxed{}`, else the last of the text.

    Reads the LaTeX of common answers: `9{,}500`, `9\,500`, `\frac{1}{2}`, `\text{...}` next to the number, `\$`.
    """
    if "####" in text:
        found = _NUMBER.search(_plain(text.rpartition("####")[2]))
        if found:
            return _value(found)
    for part in (_boxed(text), text):
        found = list(_NUMBER.finditer(_plain(part)))
        if found:
            return _value(found[-1])
    return None


def is_correct(question: Question, text: str) -> bool:
    """Whether the final numbers are equal."""
    found = final_number(text)
    return found is not None and found == final_number(question.reference)


def _boxed(text: str) -> str:
    r"""Returns the text inside the braces of the last `\boxed{`; "" if there is none."""
    start = text.rfind(r"\boxed{")
    inside, depth = text[start + len(r"\boxed{") :] if start >= 0 else "", 1
    for i, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return inside[:i]
    return inside


def _plain(text: str) -> str:
    """Returns the text with its numbers in plain ASCII."""
    text = _TEXT.sub(" ", _GROUPING.sub("", text.replace("−", "-").replace(r"\$", "$")))
    return _FRACTION.sub(r"\1/\2", text)


def _value(found: re.Match) -> Fraction | None:
    sign, *parts = found.groups()
    digits = [part.replace(",", "") for part in parts if part]
    if max(map(len, digits)) > _LONGEST:
        return None
    value, divisor = Fraction(digits[0]), Fraction(digits[1]) if len(digits) > 1 else Fraction(1)
    return (-value if sign else value) / divisor if divisor else None
