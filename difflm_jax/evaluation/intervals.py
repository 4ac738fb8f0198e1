"""Error bars: bootstrap intervals of a mean and of the difference of two ways of answering the same questions."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (Efron and Tibshirani, 1993, chapter 13) of the mean over rows."""
    low, high = np.quantile(_means(np.asarray(values, np.float64), seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def difference_interval(values: Sequence[float], others: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Of the mean of `values` minus that of `others` on the same rows: rows are drawn, each with both of its values."""
    return mean_interval(np.asarray(values, np.float64) - np.asarray(others, np.float64), seed)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Of a ratio of sums over rows (nats a token, bits a byte), drawn together."""
    tops, bottoms = (_means(np.asarray(x, np.float64), seed) for x in (numerators, denominators))
    low, high = np.quantile(tops / bottoms, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _means(values_R: np.ndarray, seed: int) -> np.ndarray:
    """[RESAMPLES] means of as many rows drawn with replacement; the same draws for the same seed and number of rows."""
    rng, rows, means = np.random.default_rng(seed), len(values_R), []
    for _ in range(RESAMPLES // 100):  # not all draws at once: a million rows would be 80 GB
        means.append(values_R[rng.integers(rows, size=(100, rows))].mean(axis=1))
    return np.concatenate(means)
