"""Questions with known answers: how often a model says exactly the reference, beside its own causal base."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from difflm_jax.data.formats import Conversation, parse_row
from difflm_jax.data.sources import RowError, open_source
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt (messages up to the last answer) and the reference answer."""

    messages: list[dict]
    reference: str


@dataclasses.dataclass(frozen=True)
class Column:
    """The answers of one way of decoding."""

    name: str
    answers: list[str]
    matches: int
    seconds: float
    passes: float  # forward passes that an answer used, on average


def read_questions(dataset: str, rows: int = 0) -> list[Question]:
    """The first `rows` (0: all) question rows of a data set, in any format that training takes."""
    questions = []
    for row in open_source(dataset).rows():
        try:
            _, parsed = parse_row(row.load())
        except RowError as error:
            raise UserError(f"{row.origin}: {error}") from error
        if not isinstance(parsed, Conversation) or parsed.messages[-1]["role"] != "assistant":
            raise UserError(f"{row.origin}: the row has no answer to compare with")
        questions.append(Question(list(parsed.messages[:-1]), parsed.messages[-1]["content"]))
        if len(questions) == rows:
            break
    return questions


def normalised(text: str) -> str:
    """Lower case, single spaces, without one final period: what counts in an exact match."""
    return " ".join(text.lower().split()).removesuffix(".")


def compare(
    lm: LanguageModel, questions: Sequence[Question], tokens_per_pass: Sequence[int], max_new_tokens: int
) -> list[Column]:
    """The causal base's greedy answers, then those of `lm` at each number of tokens committed in a forward pass."""
    columns = [_answer(lm.base(), "causal base", questions, max_new_tokens, max_new_tokens)]
    for tokens in tokens_per_pass:
        name = f"{tokens} token{'s' if tokens > 1 else ''} a pass"
        columns.append(_answer(lm, name, questions, max_new_tokens, -(-max_new_tokens // tokens)))
    return columns


def print_report(
    lm: LanguageModel,
    dataset: str,
    questions: Sequence[Question],
    tokens_per_pass: Sequence[int],
    max_new_tokens: int,
    shown: int = 12,
) -> list[Column]:
    """Answers `questions` (of `dataset`), prints some of them and a table of exact matches; returns the columns."""
    columns = compare(lm, questions, tokens_per_pass, max_new_tokens)
    print(f"\nHeld-out questions ({len(questions)}, {dataset}), answers of at most {max_new_tokens} tokens")
    for i in range(0, len(questions), max(1, len(questions) // shown)):
        question = questions[i]
        print(f"\n  Q: {question.messages[-1]['content']}\n     reference        {question.reference}")
        for column in columns:
            same = normalised(column.answers[i]) == normalised(question.reference)
            print(f"   {'=' if same else ' '} {column.name:<16} {' '.join(column.answers[i].split())}")
    base = columns[0].matches
    print(f"\n  {'decoding':<18}{'exact match':>14}{'of the base':>14}{'passes':>10}{'seconds':>10}")
    for column in columns:
        share = f"{column.matches}/{len(questions)} = {column.matches / len(questions):.2f}"
        relative = f"{column.matches / base:.2f}" if base else "-"
        print(f"  {column.name:<18}{share:>14}{relative:>14}{column.passes:>10.1f}{column.seconds:>10.1f}")
    return columns


def _answer(lm: LanguageModel, name: str, questions: Sequence[Question], max_new_tokens: int, steps: int) -> Column:
    start = time.perf_counter()
    out = lm.generate([q.messages for q in questions], max_new_tokens, steps, batch_size=len(questions))
    answers = out.texts
    matches = sum(normalised(a) == normalised(q.reference) for a, q in zip(answers, questions, strict=True))
    return Column(name, answers, matches, time.perf_counter() - start, float(np.mean(out.steps)))
