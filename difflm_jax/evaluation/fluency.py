"""Fluency of generated answers, right or wrong: length, end of sequence, repetition, and NLL under the causal base."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from difflm_jax.evaluation.intervals import mean_interval, ratio_interval
from difflm_jax.evaluation.report import Column
from difflm_jax.evaluation.tasks import Question
from difflm_jax.lm import LanguageModel
from difflm_jax.view.tables import print_table

NGRAM = 4  # length of the token sequences whose recurrence counts as repetition


def fluency(lm: LanguageModel, questions: Sequence[Question], column: Column, batch_size: int) -> dict[str, Any]:
    """Returns metrics of one decoding's answers: means over the questions with 95 % bootstrap intervals.

    tokens: length, including the end of sequence.
    ended: share of answers with an end of sequence within the canvas.
    empty: share of answers that start with an end of sequence.
    repetition: share of an answer's 4-grams of tokens that occur earlier in it.
    base_nll: exact nats per token under the causal base; None if every answer is only an end of sequence.
    """
    ends = [bool(np.isin(tokens[-1:], lm.eos_token_ids).any()) for tokens in column.tokens]
    rows = {
        "tokens": [len(tokens) for tokens in column.tokens],
        "ended": ends,
        "empty": [end and len(tokens) == 1 for end, tokens in zip(ends, column.tokens, strict=True)],
        "repetition": [repetition(tokens) for tokens in column.tokens],
    }
    figures: dict[str, Any] = {
        name: {"mean": float(np.mean(x)), "interval": mean_interval(x)} for name, x in rows.items()
    }
    kept = [i for i, empty in enumerate(rows["empty"]) if not empty and column.tokens[i]]
    if not kept:
        return {**figures, "base_nll": None}
    prompts = [questions[i].prompt for i in kept]
    found = lm.base().log_likelihood(prompts, [column.tokens[i] for i in kept], batch_size=batch_size)
    mean = float(-found.values.sum() / found.tokens.sum())
    return {**figures, "base_nll": {"mean": mean, "interval": ratio_interval(-found.values, found.tokens)}}


def repetition(tokens: Sequence[int]) -> float:
    """Returns the share of the 4-grams of `tokens` that occur earlier in them; 0 if there are fewer than two."""
    ngrams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(Counter(ngrams)) / len(ngrams) if ngrams else 0.0


def print_fluency(
    lm: LanguageModel, questions: Sequence[Question], columns: Sequence[Column], batch_size: int
) -> dict[str, dict[str, Any]]:
    """Prints a table of all decodings and returns their metrics by name."""
    found = {column.name: fluency(lm, questions, column, batch_size) for column in columns}
    print("\nHow the answers read")
    print_table(
        ["decoding", "tokens", "ended", "empty", "repeats", "NLL under the base"],
        [_row(name, figures) for name, figures in found.items()],
    )
    return found


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    nll = "-"
    if figures["base_nll"]:
        low, high = figures["base_nll"]["interval"]
        nll = f"{figures['base_nll']['mean']:.3f} [{low:.2f}, {high:.2f}]"
    formats = {"tokens": ".1f", "ended": ".2f", "empty": ".2f", "repetition": ".3f"}
    return [name, *(format(figures[key]["mean"], style) for key, style in formats.items()), nll]
