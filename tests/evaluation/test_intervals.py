"""Bootstrap intervals against the normal approximation and against repeated experiments."""

import numpy as np
import pytest

from difflm_jax.evaluation.fluency import repetition
from difflm_jax.evaluation.intervals import difference_interval, mean_interval, ratio_interval, share_interval


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation_for_many_rows():
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = mean_interval(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.006)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(1), 0
    for seed in range(120):
        low, high = mean_interval(rng.random(80) < 0.4, seed)
        covered += low <= 0.4 <= high
    assert 0.88 <= covered / 120 <= 0.99


def test_a_share_of_few_rows_has_an_interval_though_all_are_alike():
    """Regression: the interval of 0 of 4 was [0, 0]."""
    low, high = share_interval([False] * 4)
    assert (low, high) == pytest.approx((0, 1.96**2 / (4 + 1.96**2)), abs=1e-3)  # Wilson's formula with no hit
    assert share_interval([True] * 4) == pytest.approx((1 - high, 1), abs=1e-9)
    hits = np.random.default_rng(0).random(400) < 0.3
    assert share_interval(hits) == pytest.approx(mean_interval(hits), abs=0.01)


def test_pairs_are_drawn_together():
    rng = np.random.default_rng(2)
    hard = rng.random(200) < 0.5
    better = hard | (rng.random(200) < 0.1)  # the same rows and a few more
    low, high = difference_interval(better, hard)
    assert 0 < low < high < 0.12
    unpaired = mean_interval(np.concatenate([better, -hard.astype(float)]))
    assert high - low < 2 * np.ptp(unpaired)
    assert difference_interval(hard, hard) == (0, 0)


def test_a_ratio_of_sums():
    sizes = np.random.default_rng(3).integers(1, 50, 300)
    assert ratio_interval(2.0 * sizes, sizes) == pytest.approx((2, 2))


def test_repetition_is_the_share_of_ngrams_that_were_there_before():
    assert repetition([1, 2, 3]) == 0
    assert repetition(range(20)) == 0
    assert repetition([7] * 8) == 0.8  # five 4-grams, one of them new
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)
