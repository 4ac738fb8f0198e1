"""Accuracy of a model and of its causal base on questions with known answers, with 95 % intervals."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from difflm_jax.evaluation.intervals import difference_interval, share_interval
from difflm_jax.evaluation.tasks import TASKS, Question
from difflm_jax.lm import LanguageModel
from difflm_jax.view.pieces import printable
from difflm_jax.view.tables import print_table


@dataclasses.dataclass(frozen=True)
class Column:
    """The answers of one decoding. Each question has a text, tokens, whether it is right, and forward passes."""

    name: str
    answers: list[str]
    matches: int
    seconds: float
    correct: list[bool]
    passes: list[int]
    tokens: list[list[int]]

    def record(self, base: "Column") -> dict[str, Any]:
        """Returns the column, its accuracy and the difference from the base's accuracy, with 95 % intervals."""
        return {
            **dataclasses.asdict(self),
            "accuracy": self.matches / len(self.correct),
            "interval": share_interval(self.correct),
            "minus_base": (self.matches - base.matches) / len(self.correct),
            "minus_base_interval": difference_interval(self.correct, base.correct),
        }


@dataclasses.dataclass(frozen=True)
class Decodings:
    """How questions are answered.

    tokens_per_pass: tokens committed per forward pass; each value is a separate decoding.
    max_new_tokens: length of the canvas. batch_size: questions per batch.
    task: decides which answers count as right. options: of `LanguageModel.generate`, for the converted model.
    causally: adds the same weights, adapter included, decoded as a causal model.
    """

    tokens_per_pass: Sequence[int]
    max_new_tokens: int
    task: str = "exact"
    batch_size: int = 64
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    causally: bool = False


def compare(lm: LanguageModel, questions: Sequence[Question], decodings: Decodings) -> list[Column]:
    """Decodes greedy answers with the causal base, with `lm` at each `tokens_per_pass`, and with `lm` causally."""
    ways = [(lm.base(), "causal base", 1, {})]
    ways += [
        (lm, f"{tokens} token{'s' if tokens > 1 else ''} a pass", tokens, decodings.options)
        for tokens in decodings.tokens_per_pass
    ]
    if decodings.causally and not lm.diffusion.gated:  # a gated adapter decoded causally is its base
        same = dataclasses.replace(lm, diffusion=lm.diffusion.causal())
        ways.append((same, "causally", 1, {}))
    return [_answers(*way, questions, decodings) for way in ways]


def _answers(
    lm: LanguageModel,
    name: str,
    tokens: int,
    options: Mapping[str, Any],
    questions: Sequence[Question],
    decodings: Decodings,
) -> Column:
    start = time.perf_counter()
    prompts, length = [question.prompt for question in questions], decodings.max_new_tokens
    steps = max(-(-length // tokens), lm.diffusion.fewest_passes(length, options.get("block_length")))
    out = lm.generate(prompts, length, steps, batch_size=decodings.batch_size, **options)
    is_correct = TASKS[decodings.task].is_correct
    correct = [is_correct(question, text) for question, text in zip(questions, out.texts, strict=True)]
    seconds = time.perf_counter() - start
    return Column(
        name, out.texts, sum(correct), seconds, correct, out.steps.tolist(), [row.tolist() for row in out.tokens]
    )


def print_report(
    lm: LanguageModel, dataset: str, questions: Sequence[Question], decodings: Decodings, shown: int = 12
) -> list[Column]:
    """Answers `questions` of `dataset`, prints about `shown` of them and a table; returns the columns."""
    columns = compare(lm, questions, decodings)
    print(f"\nQuestions ({len(questions)}, {dataset}), answers of at most {decodings.max_new_tokens} tokens")
    for i in range(0, len(questions), max(1, len(questions) // shown)) if shown else []:
        print(f"\n  Q: {_line(questions[i].messages[-1]['content'])}")
        print(f"     reference        {_line(questions[i].reference)}")
        for column in columns:
            print(f"   {'=' if column.correct[i] else ' '} {column.name:<16} {_line(column.answers[i])}")
    score = "exact match" if decodings.task == "exact" else "correct"
    head = ["decoding", score, "95 %", "of the base", "minus base, 95 %", "passes", "seconds"]
    print_table(head, [_row(column, columns[0], len(questions)) for column in columns])
    return columns


def _row(column: Column, base: Column, count: int) -> list[str]:
    low, high = share_interval(column.correct)
    difference = "-"
    if column is not base:
        least, most = difference_interval(column.correct, base.correct)
        difference = f"{(column.matches - base.matches) / count:+.2f} [{least:+.2f}, {most:+.2f}]"
    return [
        column.name,
        f"{column.matches}/{count} = {column.matches / count:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{column.matches / base.matches:.2f}" if base.matches else "-",
        difference,
        f"{sum(column.passes) / count:.1f}",
        f"{column.seconds:.1f}",
    ]


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
