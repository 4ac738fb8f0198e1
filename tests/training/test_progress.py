"""When a phase evaluates, what the terminal shows, and the time to go."""

import numpy as np

from difflm_jax.config import default_config
from difflm_jax.diffusion.objective import LossSums
from difflm_jax.training import progress
from difflm_jax.training.cadence import Cadence
from difflm_jax.training.phase import PhaseData
from difflm_jax.training.progress import Progress, progress_line
from tests.data.test_batches import make


def phase(rows: int, tested: int, length: int = 100, **settings) -> PhaseData:
    config = default_config()
    config.update(settings)
    train_rows, test_rows = (make([(length // 2, length // 2)] * count) for count in (rows, tested))
    return PhaseData("sft", config, train_rows, test_rows, 0, 1)


def test_54_rows_are_not_evaluated_after_every_step() -> None:
    """With 48 + 6 rows, an evaluation with its samples is as much work as several steps of 64 rows."""
    few = phase(48, 6, epochs=60)
    cadence = Cadence.of(few)
    assert few.plan.steps_per_epoch == 1
    assert cadence.evaluation_interval > 5
    evaluations = sum(cadence.evaluates(step) for step in range(1, 61))
    assert evaluations * cadence.evaluation_steps <= 0.1 * (60 + evaluations * cadence.evaluation_steps) + 1
    assert Cadence.of(phase(48, 6, epochs=60, eval_interval=1)).evaluation_interval == 1  # asked for


def test_usual_sizes_are_evaluated_as_often_as_before() -> None:
    """Four times an epoch: a tenth of the rows is a tenth of the work of training, at most a few samples too much."""
    usual = phase(9000, 500)
    assert Cadence.of(usual).evaluation_interval == usual.plan.steps_per_epoch // 4 == 35
    tenth = Cadence.of(phase(18_000, 2000))
    assert 70 <= tenth.evaluation_interval <= 80 and tenth.total == 282
    every = Cadence.of(phase(1000, 0, epochs=3))
    assert every.evaluation_interval == 16 // 4 and every.evaluation_steps == 0  # no test split: checkpoints alone


def test_evaluations_left_are_those_that_follow() -> None:
    for total, interval in ((10, 3), (9, 3), (5, 7), (4, 1)):
        cadence = Cadence(total, 1000, interval)
        for step in range(total + 1):
            expected = sum(cadence.evaluates(later) for later in range(step + 1, total + 1))
            assert cadence.evaluations_after(step) == expected, (total, interval, step)


def test_the_time_to_go_has_evaluations_and_no_compilation() -> None:
    shown = Progress("sft", Cadence(100, 1000, 20, evaluation_steps=5.0))
    sums = LossSums(*(np.float32(1) for _ in range(6)))
    shown.add(sums, 60.0, 10)  # compiles
    assert shown.seconds_left(1) is None
    for _ in range(9):
        shown.add(sums, 1.0, 10)
    assert shown.seconds_left(10) == 90 + 5 * 5  # five evaluations, each as five steps
    shown.evaluated(30.0)
    shown.evaluated(8.0)  # the first one compiled
    assert shown.seconds_left(40) == 60 + 3 * 8


def test_a_line_is_shown_in_the_first_steps_whatever_log_interval_is(capsys, monkeypatch) -> None:
    shown = Progress("sft", Cadence(1000, 1000, 1000))
    sums = LossSums(np.float32(4), np.float32(2), np.ones(5), np.ones(5), np.ones(5), np.float32(10))
    for step in range(1, 8):
        shown.add(sums, 0.5, 10)
        shown.show_if_due(step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/1000", "2/1000", "5/1000"]
    assert lines[0] == "sft 1/1000  loss 2.0000  masked_nll 1.0000  20 tokens/s  ETA -"
    assert lines[1].endswith("ETA 8m19s")
    monkeypatch.setattr(progress, "SHOW_SECONDS", 0.0)
    shown.show_if_due(7)
    assert capsys.readouterr().out.startswith("sft 7/1000")


def test_the_progress_line() -> None:
    record = {"phase": "pretrain", "step": 100, "loss": 2.5, "masked_nll": 3.25, "tokens_per_second": 1000.0}
    line = progress_line(record, 400, 150.0)
    assert line == "pretrain 100/400  loss 2.5000  masked_nll 3.2500  1,000 tokens/s  ETA 2m30s"
    assert progress_line(record, 400, 15_000.0).endswith("ETA 4h10m")
    assert progress_line(record, 100, 0.0).endswith("ETA 0s")
    empty = {**record, "loss": float("nan"), "masked_nll": None, "tokens_per_second": None}
    assert progress_line(empty, 400, None) == "pretrain 100/400  loss nan  masked_nll -  - tokens/s  ETA -"


def test_one_step_is_warned_about_with_the_keys_to_change() -> None:
    (note,) = phase(48, 6).advice()
    assert "sft makes only 1 optimiser steps of 64 rows" in note and "gradient_accumulation_steps=4" in note
    assert phase(48, 6, epochs=20).advice() == []
    assert phase(48, 6, epochs=20, max_steps=5).advice() == []  # asked for


def test_the_preview_counts_steps_and_tokens_as_training_does() -> None:
    short = phase(300, 0, length=70, epochs=4, max_steps=5)
    assert short.steps == 5 and "5 steps of 64 rows" in short.describe()
    padded = np.mean([(step["segments"] > 0).mean() for step in (short.train_batches()[i] for i in range(4))])
    assert f"{padded:.1%}" == f"{short.plan.real_share:.1%}" == "54.7%"
