"""Countdown: combine given numbers, each used once, to reach a target (the test set of d1, arXiv:2504.12216)."""

import ast
import operator
import re
from fractions import Fraction
from typing import Any

from difflm_jax.data.sources import RowError
from difflm_jax.evaluation.tasks.question import Question, ask, text_field

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_EXPRESSION = re.compile(r"[\d(][\d\s+\-*/()]*[\d)]")
_LONGEST = 200  # characters of the longest expression that is evaluated


def question(row: Any) -> Question:
    """Builds a question from `input` (the numbers, separated by commas) and `output` (the target)."""
    numbers, target = _integers(text_field(row, "input"), "input"), _integers(text_field(row, "output"), "output")
    if len(target) != 1:
        raise RowError("its 'output' is not one number")
    listed = ", ".join(map(str, numbers))
    prompt = (
        f"Use each of the numbers {listed} exactly once, with +, -, * and / and parentheses, to get {target[0]}. "
        "Write the expression alone, like (1 + 2) * 3."
    )
    return Question(ask(prompt), str(target[0]), row)


def is_correct(question: Question, text: str) -> bool:
    """Whether the last expression of the text uses every number once and has the value of the target."""
    numbers = _integers(question.row["input"], "input")
    found = _EXPRESSION.findall(_answer_part(text))
    if not found or len(found[-1]) > _LONGEST:
        return False
    try:
        value, used = _evaluate(ast.parse(found[-1].strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return sorted(used) == sorted(numbers) and value == int(question.reference)


def _answer_part(text: str) -> str:
    """Returns the last line with arithmetic, up to an equals sign, of the marked answer or else of the text."""
    for pattern in (r"<answer>(.*?)(?:</answer>|$)", r"\\boxed\{([^}]*)"):
        if marked := re.findall(pattern, text, re.DOTALL):
            text = marked[-1]
    text = text.replace("\\times", "*").replace("×", "*").replace("\\div", "/").replace("÷", "/")
    lines = [line.split("=")[0] for line in text.splitlines() if re.search(r"\d\s*[-+*/]", line)]
    return lines[-1] if lines else ""


def _evaluate(node: ast.AST) -> tuple[Fraction, list[int]]:
    """Returns (exact value, integers used). Raises `ValueError` for anything but arithmetic on integers."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value), [node.value]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        (left, used), (right, more) = _evaluate(node.left), _evaluate(node.right)
        return _OPERATIONS[type(node.op)](left, right), used + more
    raise ValueError("not arithmetic")


def _integers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RowError(f"its {name!r} is not integers separated by commas") from error
