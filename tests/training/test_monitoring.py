"""Monitoring of a run from outside: heartbeat, step times, memory, profiles."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.objective import LossSums
from difflm_jax.training.cadence import Cadence
from difflm_jax.training.meter import Measured, Meter
from difflm_jax.training.metrics import MetricsLog, read_metrics
from difflm_jax.training.monitoring import Heartbeat, Profile, StepResult, memory_peaks


class _Speed:
    def flops(self, sums):
        return 0.0

    def fields(self, tokens_per_second, flops_per_second):
        return {"tokens_per_second": tokens_per_second}


class _NoTracker:
    def log(self, *_):
        pass


def metrics_of(loss: float) -> dict:
    bucket = jnp.ones(5)
    sums = LossSums(jnp.float32(loss), jnp.float32(2), bucket, bucket, bucket, jnp.float32(10))
    return {"sums": sums, "finite": jnp.isfinite(loss), "grad_norm": jnp.float32(1), "learning_rate": jnp.float32(0.1)}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("difflm_jax.training.meter.time.perf_counter", lambda: now[0])
    return now


def meter(directory, saved=None) -> Meter:
    measured = Measured("sft", Cadence(10, 100, 100), _Speed(), lambda step: {"rows": [f"a:{step}"]}, max_nonfinite=10)
    return Meter(measured, MetricsLog(directory), _NoTracker(), saved)


def test_a_line_tells_slow_steps_and_waiting_for_data(tmp_path, clock):
    watched = meter(tmp_path)
    for step, seconds in enumerate([1.0, 1.0, 5.0, 1.0], start=1):
        clock[0] += seconds
        watched.add(step, metrics_of(1.0), waited=0.2)
    watched.write(4)
    (line,) = read_metrics(tmp_path)
    assert (line["step_seconds"], line["slow_steps"], line["slowest_step_seconds"]) == (1.0, 1, 5.0)
    assert line["data_wait"] == pytest.approx(0.1)
    assert line["tokens_per_second"] == pytest.approx(5.0)
    assert line["host_memory_peak"] > 1e7


def test_a_meter_goes_on_from_what_a_checkpoint_holds(tmp_path, clock):
    """The line behind a break in the middle of an interval is the one without it, skipped steps included."""
    losses = [1.25, float("nan"), 0.1, 0.7]
    clock[0] = 1.0
    whole, first = meter(tmp_path / "whole"), meter(tmp_path / "broken")
    for step, loss in enumerate(losses, start=1):
        whole.add(step, metrics_of(loss), 0.0)
    for step in (1, 2):
        first.add(step, metrics_of(losses[step - 1]), 0.0)
    second = meter(tmp_path / "broken", json.loads(json.dumps(first.state())))
    for step in (3, 4):
        second.add(step, metrics_of(losses[step - 1]), 0.0)
    whole.write(4)
    second.write(4)
    timed = {"tokens_per_second", "step_seconds", "slowest_step_seconds", "slow_steps", "data_wait", "host_memory_peak"}
    plain = [
        [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    np.testing.assert_equal(*plain)
    assert plain[0][0]["nonfinite"]["rows"] == ["a:1"] and plain[0][1]["skipped_steps"] == 1


def test_a_heartbeat_says_where_the_run_is_and_never_too_often(tmp_path):
    heartbeat = Heartbeat(tmp_path, 1000, "sft", 10)
    heartbeat.before(4)
    heartbeat.beat(4, "training")
    record = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (record["phase"], record["step"], record["total_steps"], record["doing"]) == ("sft", 3, 10, "training")
    assert record["time"].endswith("+00:00") and record["host_memory_peak"] == memory_peaks()["host_memory_peak"]
    Heartbeat(tmp_path / "none", 0, "sft", 1).beat(1, "training")
    Heartbeat(tmp_path / "missing", 1, "sft", 1).beat(1, "training")  # a failing disk must not end a run
    assert not (tmp_path / "none").exists()


def test_a_profile_covers_the_chosen_steps(tmp_path, capsys):
    step = jax.jit(lambda x: x @ x)
    profile = Profile(tmp_path / "profile", first=2, steps=2)
    for number in range(1, 6):
        profile.before(number)
        profile.after(number, StepResult({"x": step(jnp.ones((8, 8)))}))
        assert (tmp_path / "profile").exists() == (number >= 3)  # written when the last chosen step is done
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert capsys.readouterr().out.count("profile: wrote") == 1
    Profile(tmp_path / "no profile", first=1, steps=0).before(1)
    assert not (tmp_path / "no profile").exists()
