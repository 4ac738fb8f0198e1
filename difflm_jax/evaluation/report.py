"""Questions with known answers: how often a model is right, beside its own causal base, with error bars."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from difflm_jax.evaluation.intervals import difference_interval, mean_interval
from difflm_jax.evaluation.tasks import TASKS, Question
from difflm_jax.lm import LanguageModel
from difflm_jax.view.pieces import printable


@dataclasses.dataclass(frozen=True)
class Column:
    """The answers of one way of decoding: for each question its text and tokens, whether it is right,
    and its forward passes."""

    name: str
    answers: list[str]
    matches: int
    seconds: float
    correct: list[bool]
    passes: list[int]
    tokens: list[list[int]]

    def record(self, base: "Column") -> dict[str, Any]:
        """The column with its share of right answers, and its difference from the base's; 95 % bootstrap intervals."""
        return {
            **dataclasses.asdict(self),
            "accuracy": self.matches / len(self.correct),
            "interval": mean_interval(self.correct),
            "minus_base": (self.matches - base.matches) / len(self.correct),
            "minus_base_interval": difference_interval(self.correct, base.correct),
        }


def compare(
    lm: LanguageModel,
    questions: Sequence[Question],
    tokens_per_pass: Sequence[int],
    max_new_tokens: int,
    task: str = "exact",
    batch_size: int = 64,
    decoding: Mapping[str, Any] | None = None,
) -> list[Column]:
    """The causal base's greedy answers, then those of `lm` at each number of tokens committed in a forward pass.

    `decoding`: options of `LanguageModel.generate` for `lm`.
    """
    ways = [(lm.base(), "causal base", 1, {})]
    ways += [
        (lm, f"{tokens} token{'s' if tokens > 1 else ''} a pass", tokens, decoding or {}) for tokens in tokens_per_pass
    ]
    columns = []
    for model, name, tokens, options in ways:
        start = time.perf_counter()
        prompts = [question.prompt for question in questions]
        fewest = model.diffusion.fewest_passes(max_new_tokens, options.get("block_length"))
        steps = max(-(-max_new_tokens // tokens), fewest)
        out = model.generate(prompts, max_new_tokens, steps, batch_size=batch_size, **options)
        is_correct = TASKS[task].is_correct
        correct = [is_correct(question, text) for question, text in zip(questions, out.texts, strict=True)]
        seconds = time.perf_counter() - start
        tokens = [row.tolist() for row in out.tokens]
        columns.append(Column(name, out.texts, sum(correct), seconds, correct, out.steps.tolist(), tokens))
    return columns


def print_report(
    lm: LanguageModel,
    dataset: str,
    questions: Sequence[Question],
    tokens_per_pass: Sequence[int],
    max_new_tokens: int,
    shown: int = 12,
    task: str = "exact",
    batch_size: int = 64,
    decoding: Mapping[str, Any] | None = None,
) -> list[Column]:
    """Answers `questions` (of `dataset`), prints some of them and a table of right answers; returns the columns."""
    columns = compare(lm, questions, tokens_per_pass, max_new_tokens, task, batch_size, decoding)
    print(f"\nHeld-out questions ({len(questions)}, {dataset}), answers of at most {max_new_tokens} tokens")
    for i in range(0, len(questions), max(1, len(questions) // shown)):
        print(f"\n  Q: {_line(questions[i].messages[-1]['content'])}")
        print(f"     reference        {_line(questions[i].reference)}")
        for column in columns:
            print(f"   {'=' if column.correct[i] else ' '} {column.name:<16} {_line(column.answers[i])}")
    base = columns[0]
    score = "exact match" if task == "exact" else "correct"
    print(
        f"\n  {'decoding':<18}{score:>14}{'95 %':>14}{'of the base':>14}{'minus base, 95 %':>24}{'passes':>8}"
        f"{'seconds':>10}"
    )
    for column in columns:
        share = f"{column.matches}/{len(questions)} = {column.matches / len(questions):.2f}"
        low, high = mean_interval(column.correct)
        relative = f"{column.matches / base.matches:.2f}" if base.matches else "-"
        difference = "-"
        if column is not base:
            least, most = difference_interval(column.correct, base.correct)
            difference = f"{(column.matches - base.matches) / len(questions):+.2f} [{least:+.2f}, {most:+.2f}]"
        print(
            f"  {column.name:<18}{share:>14}{f'[{low:.2f}, {high:.2f}]':>14}{relative:>14}{difference:>24}"
            f"{sum(column.passes) / len(questions):>8.1f}{column.seconds:>10.1f}"
        )
    return columns


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
