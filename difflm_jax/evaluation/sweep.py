"""Compares decoding settings on questions with known answers: quality against speed, and the setting to keep."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from difflm_jax.diffusion.config import BLOCK_RULES
from difflm_jax.errors import UserError
from difflm_jax.evaluation.intervals import difference_interval, mean_interval
from difflm_jax.evaluation.lossless import draft_table, passes, strategies
from difflm_jax.evaluation.tasks import TASKS, Question
from difflm_jax.lm import LanguageModel

BLOCK = 32  # block length of candidates that fill an answer in blocks
TOKENS_PER_PASS = (1, 2, 4)
THRESHOLDS = (0.5, 0.7, 0.9)
FASTEST_STRATEGIES = 4  # of a drafting adapter: only the best by the table of drafts are timed


@dataclasses.dataclass(frozen=True)
class Point:
    """The results of one setting."""

    options: dict[str, Any]  # those of `LanguageModel.generate`, and tokens_per_pass
    correct: list[bool]
    passes: float  # mean forward passes per answer
    tokens_per_second: float

    @property
    def quality(self) -> float:
        """The share of right answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def name(self) -> str:
        """The options, written as flags."""
        return " ".join(f"{name}={value}" for name, value in self.options.items())

    def record(self) -> dict[str, Any]:
        """Returns the results as a JSON record."""
        return {
            "options": self.options,
            "quality": round(self.quality, 4),
            "interval": [round(x, 4) for x in mean_interval(self.correct)],
            "passes": round(self.passes, 2),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


@dataclasses.dataclass(frozen=True)
class Trial:
    """How settings are tried: `max_new_tokens` per answer, in batches, judged by the rules of `task`."""

    max_new_tokens: int
    task: str = "exact"
    batch_size: int = 16
    seed: int = 0


def candidates(lm: LanguageModel, questions: Sequence[Question], trial: Trial) -> list[dict[str, Any]]:
    """Returns the settings that are worth trying for a model. Raises `UserError` if there is nothing to tune."""
    if lm.diffusion.gated:
        return _drafting(lm, questions, trial)
    if lm.attention == "causal":
        raise UserError("tune: a causal model decodes one token per pass from left to right; there is nothing to tune")
    found: list[dict[str, Any]] = []
    for algorithm in dict.fromkeys((lm.algorithm if lm.algorithm != "steady" else "probability", "probability")):
        found += [{"algorithm": algorithm, "tokens_per_pass": tokens} for tokens in TOKENS_PER_PASS]
    found += [{"algorithm": "steady", "threshold": threshold} for threshold in THRESHOLDS]
    if lm.attention not in BLOCK_RULES and trial.max_new_tokens > BLOCK and trial.max_new_tokens % BLOCK == 0:
        fast = {"algorithm": "probability", "threshold": 0.9, "block_length": BLOCK}
        found += [{**fast, "cache": cache} for cache in ("auto", "prefix", "dual")]
    return found


def _drafting(lm: LanguageModel, questions: Sequence[Question], trial: Trial) -> list[dict[str, Any]]:
    """Returns the strategies of a drafting adapter with the fewest passes, counted exactly from a table of drafts."""
    rows = lm.prompts.all([question.prompt for question in questions])
    base = lm.base().generate(rows, trial.max_new_tokens, trial.max_new_tokens, batch_size=trial.batch_size)
    table = draft_table(lm, rows, base.tokens, lm.diffusion.draft_length)
    ways = sorted(
        strategies(lm.diffusion.draft_length).values(), key=lambda way: sum(passes(row, way) for row in table)
    )
    promising = ways[:FASTEST_STRATEGIES]
    return [{"strategy": way.strategy, "draft_length": way.length, "lookup": way.lookup} for way in promising]


def measured(lm: LanguageModel, questions: Sequence[Question], options: Mapping[str, Any], trial: Trial) -> Point:
    """Times the answers to all questions with `options`, after a first batch as warm-up for compilation."""
    prompts, most = [question.prompt for question in questions], trial.max_new_tokens
    given = {name: value for name, value in options.items() if name != "tokens_per_pass"}
    steps = -(-most // options.get("tokens_per_pass", 1))
    steps = max(steps, lm.diffusion.fewest_passes(most, options.get("block_length")))
    arguments = {"max_new_tokens": most, "steps": steps, "batch_size": trial.batch_size, "seed": trial.seed, **given}
    lm.generate(prompts[: trial.batch_size], **arguments)
    began = time.perf_counter()
    out = lm.generate(prompts, **arguments)
    seconds = time.perf_counter() - began
    is_correct = TASKS[trial.task].is_correct
    correct = [bool(is_correct(question, text)) for question, text in zip(questions, out.texts, strict=True)]
    return Point(dict(options), correct, float(np.mean(out.steps)), sum(map(len, out.tokens)) / seconds)


def front(points: Sequence[Point]) -> list[Point]:
    """Returns the Pareto front in quality and tokens/s, fastest first."""

    def beaten(point: Point) -> bool:
        return any(
            other.quality >= point.quality
            and other.tokens_per_second >= point.tokens_per_second
            and (other.quality, other.tokens_per_second) != (point.quality, point.tokens_per_second)
            for other in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda point: -point.tokens_per_second)


def chosen(points: Sequence[Point]) -> Point:
    """Returns the fastest point whose quality is not significantly below the best (paired bootstrap, 95 %)."""
    best = max(points, key=lambda point: (point.quality, point.tokens_per_second))
    good = [point for point in points if difference_interval(point.correct, best.correct)[1] >= 0]
    return max(good, key=lambda point: point.tokens_per_second)
