"""Likelihoods of answers and of plain text under a converted model (a bound) and under its causal base (exact)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from difflm_jax.data.formats import parse_row
from difflm_jax.data.sources import RowError, open_source
from difflm_jax.errors import UserError
from difflm_jax.evaluation.intervals import difference_interval, ratio_interval
from difflm_jax.evaluation.tasks import Question
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.likelihood import LogLikelihood
from difflm_jax.view.tables import print_table


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of the same rows by both models, and the UTF-8 bytes of each row's scored text."""

    base: LogLikelihood
    diffusion: LogLikelihood
    bytes: np.ndarray

    def record(self) -> dict[str, Any]:
        """Returns the scores of both models, with their values per row."""
        nats_base, nats = -self.base.values, -self.diffusion.values
        low, high = difference_interval(nats, nats_base)
        tokens = self.base.tokens.mean()
        return {
            "causal_base": self._figures(self.base),
            "diffusion": self._figures(self.diffusion),
            "difference": {
                "nats_per_token": float((nats - nats_base).sum() / self.base.tokens.sum()),
                "interval": (low / tokens, high / tokens),
            },
            "bytes": self.bytes,
        }

    def _figures(self, found: LogLikelihood) -> dict[str, Any]:
        tokens, size = found.tokens.sum(), self.bytes.sum()
        per_token, per_byte = -found.values.sum() / tokens, -found.values.sum() / size / math.log(2)
        error = float(np.sqrt((found.standard_errors**2).sum()))
        bits = ratio_interval(-found.values / math.log(2), self.bytes)
        return {
            "nats_per_token": float(per_token),
            "nats_per_token_interval": ratio_interval(-found.values, found.tokens),
            "perplexity": float(np.exp(per_token)),
            "bits_per_byte": float(per_byte),
            "bits_per_byte_interval": bits,
            "monte_carlo_error": error / tokens if math.isfinite(error) else None,  # standard error, nats per token
            "log_likelihoods": found.values,
            "standard_errors": [x if math.isfinite(x) else None for x in found.standard_errors.tolist()],
            "tokens": found.tokens,
        }


def score_answers(lm: LanguageModel, questions: Sequence[Question], samples: int, seed: int, batch_size: int) -> Scored:
    """Scores the reference answers of `questions`, each after its question."""
    rows = [question.prompt for question in questions], [question.reference for question in questions]
    return Scored(
        lm.base().log_likelihood(*rows, batch_size=batch_size),
        lm.log_likelihood(*rows, samples, seed, batch_size),
        np.array([len(question.reference.encode("utf-8", "surrogatepass")) for question in questions]),
    )


def score_text(lm: LanguageModel, windows: Sequence[tuple[list[int], int]], samples, seed, batch_size) -> Scored:
    """Scores each window of `read_windows` on its own, after the token that begins a text."""
    tokenizer = lm.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [[start]] * len(windows), [tokens for tokens, _ in windows]
    return Scored(
        lm.base().log_likelihood(*rows, batch_size=batch_size),
        lm.log_likelihood(*rows, samples, seed, batch_size),
        np.array([size for _, size in windows]),
    )


def read_windows(dataset: str, tokenizer: Any, max_length: int, rows: int = 0) -> list[tuple[list[int], int]]:
    """Reads the first `rows` (0: all) windows of plain texts, as (tokens, bytes).

    A window has at most `max_length` - 1 tokens.
    """
    windows = []
    for row in open_source(dataset).rows():
        try:
            _, text = parse_row(row.load())
        except RowError as error:
            raise UserError(f"{row.origin}: {error}") from error
        if not isinstance(text, str):
            raise UserError(f"{row.origin}: is a conversation, not plain text: score its answers with --data")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoded["offset_mapping"]]
        for first in range(0, len(starts), max_length - 1):
            last = first + max_length - 1
            part = text[starts[first] if first else 0 : starts[last] if last < len(starts) else len(text)]
            windows.append((encoded["input_ids"][first:last], len(part.encode("utf-8", "surrogatepass"))))
            if len(windows) == rows:
                return windows
    if not windows:
        raise UserError(f"{dataset}: holds no text")
    return windows


def print_scores(title: str, scored: Scored) -> dict[str, Any]:
    """Prints a table of both models and returns `scored.record()`."""
    record, rows = scored.record(), []
    print(f"\n{title}")
    for name, key, sign in (("causal base", "causal_base", ""), ("diffusion, bound", "diffusion", "<=")):
        found = record[key]
        low, high = found["nats_per_token_interval"]
        error = found["monte_carlo_error"]
        rows.append(
            [
                name,
                f"{found['nats_per_token']:.4f}",
                f"[{low:.3f}, {high:.3f}]",
                f"{sign}{found['perplexity']:.2f}",
                f"{sign}{found['bits_per_byte']:.4f}",
                "-" if error is None else f"{error:.4f}",
            ]
        )
    low, high = record["difference"]["interval"]
    rows.append(
        ["difference", f"{record['difference']['nats_per_token']:+.4f}", f"[{low:+.3f}, {high:+.3f}]", "", "", ""]
    )
    print_table(["model", "nats a token", "95 %", "perplexity", "bits a byte", "sampling error"], rows)
    return record
