"""95 % intervals: bootstrap percentiles over rows (Efron and Tibshirani, 1993, chapter 13), Wilson's for shares."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the interval of the mean over rows."""
    return _interval(lambda x, axis: x.mean(axis=axis), seed, values)


def share_interval(hits: Sequence[bool]) -> tuple[float, float]:
    """Returns the interval of a share of rows: Wilson's score interval (1927).

    A bootstrap would have zero width if all rows are right, or all wrong, even for a few rows.
    """
    from scipy import stats

    found = stats.binomtest(int(np.sum(hits)), len(hits)).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def difference_interval(values: Sequence[float], others: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the interval of mean(`values`) - mean(`others`). Both belong to the same rows, resampled together."""
    return mean_interval(np.asarray(values, np.float64) - np.asarray(others, np.float64), seed)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the interval of a ratio of sums over rows, as in nats per token. Both sums resample the same rows."""
    return _interval(lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis), seed, numerators, denominators)


def _interval(statistic: Callable[..., np.ndarray], seed: int, *samples: Sequence[float]) -> tuple[float, float]:
    from scipy import stats  # slow to import

    arrays = [np.asarray(sample, np.float64) for sample in samples]
    if len(arrays[0]) < 2:  # scipy refuses a single row: every resample is the same
        only = float(statistic(*arrays, axis=0))
        return only, only
    found = stats.bootstrap(
        arrays,
        statistic,
        n_resamples=RESAMPLES,
        batch=100,  # not all resamples at once: for a million rows they would take 80 GB
        paired=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
