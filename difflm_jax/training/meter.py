"""Accumulates the metrics of steps and writes the lines of `metrics.jsonl`."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from difflm_jax.diffusion.objective import LossSums
from difflm_jax.errors import UserError
from difflm_jax.evaluation.masked import add_sums, summarise
from difflm_jax.models.flops import forward_flops, mfu, train_flops
from difflm_jax.training.cadence import Cadence
from difflm_jax.training.metrics import MetricsLog
from difflm_jax.training.monitoring import StepResult, memory_peaks
from difflm_jax.training.progress import Progress
from difflm_jax.training.tracking import Tracker

OUTLIER = 2.0  # a step that takes longer than this times the median of its line counts as slow

_FRESH = {
    "tokens": 0,
    "skipped_steps": 0,
    "nonfinite_in_a_row": 0,
    "last_nonfinite": None,
    "sums": None,
    "last": {},
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a meter measures.

    cadence: when lines are due. speed: counts FLOPs and returns the throughput fields of a line. rows_of(index):
    returns the rows of a step (from 0). max_nonfinite: consecutive non-finite steps after which the meter gives up.
    """

    phase: str
    cadence: Cadence
    speed: "Throughput"
    rows_of: Callable[[int], Mapping[str, Any]]
    max_nonfinite: int


class Meter:
    """A duty: the metrics of the steps since the last line, and of the whole phase.

    It reads the result of a step one step late, so the host never waits for the step that it has just started. A
    non-finite step is not added to the sums. It gets its own line, which names its rows.
    """

    def __init__(self, measured: Measured, log: MetricsLog, tracker: Tracker, saved: Mapping[str, Any] | None = None):
        saved = saved or _FRESH
        self.tokens = saved["tokens"]  # real tokens since the phase began
        self.skipped_steps = saved["skipped_steps"]
        self.nonfinite_in_a_row = saved["nonfinite_in_a_row"]
        self.last_nonfinite = saved["last_nonfinite"]  # the step
        self.gave_up = 0  # consecutive non-finite steps, once there are too many; else 0
        self._sums = _sums_from(saved["sums"])
        self._last = dict(saved["last"])
        self._measured, self._log, self._tracker = measured, log, tracker
        self._progress = Progress(measured.phase, measured.cadence)
        self._pending: tuple[int, StepResult] | None = None
        self._seconds: list[float] = []
        self._waited = 0.0
        self._tokens_timed = self._flops_timed = 0.0
        self._clock = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint must store so that later lines are the same as without an interruption."""
        return {
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            # Giving up ends this run, but not the one that resumes from its checkpoint.
            "nonfinite_in_a_row": 0 if self.gave_up else self.nonfinite_in_a_row,
            "last_nonfinite": self.last_nonfinite,
            "sums": None if self._sums is None else _saved(self._sums),
            "last": self._last,
        }

    def before(self, step: int) -> None:
        """Does nothing: see `Duty`."""

    def after(self, step: int, result: StepResult) -> None:
        """Stores the result of `step` and reads that of the step before it."""
        self._read_pending()
        self._pending = (step, result)

    def settle(self) -> None:
        """Waits for the pending result and reads it."""
        self._read_pending()

    def close(self) -> None:
        """Does nothing: see `Duty`."""

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        (step, result), self._pending = self._pending, None
        self.add(step, result.metrics, result.waited)
        if self._measured.cadence.logs(step):
            self.write(step)
        else:
            self._progress.show_if_due(step)

    def add(self, step: int, metrics: Mapping[str, Any], waited: float) -> None:
        """Reads the metrics of step number `step` (from 1), which waited `waited` seconds for its data."""
        sums, finite = jax.device_get((metrics["sums"], metrics["finite"]))
        now = time.perf_counter()
        self._seconds.append(now - self._clock)
        self._clock = now
        self._progress.add(sums if finite else None, self._seconds[-1], float(sums.tokens))
        self._waited += waited
        self._tokens_timed += float(sums.tokens)
        self._flops_timed += self._measured.speed.flops(sums)
        sums = sums.replace(work=None, frozen_work=None)
        self.tokens += int(sums.tokens)
        if finite:
            self._last = {name: float(metrics[name]) for name in ("learning_rate", "grad_norm")}
            self._sums = add_sums(self._sums, sums)
            self.nonfinite_in_a_row = 0
            return
        self.skipped_steps += 1
        self.nonfinite_in_a_row += 1
        self.last_nonfinite = step
        if self.nonfinite_in_a_row >= self._measured.max_nonfinite:
            self.gave_up = self.nonfinite_in_a_row
        self._report_nonfinite(step, float(sums.loss), float(metrics["grad_norm"]))

    def write(self, step: int) -> None:
        """Writes the line of the steps since the last line; does nothing if none of them was finite."""
        if self._sums is None:
            return
        record = {
            "phase": self._measured.phase,
            "step": step,
            **summarise(self._sums),
            **self._last,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            **self._timing(),
            **memory_peaks(),
        }
        self._log.append(record)
        self._tracker.log(record["phase"], {name: record[name] for name in record if name != "phase"}, step)
        self._progress.show(record)
        self._sums, self._seconds, self._waited = None, [], 0.0
        self._tokens_timed = self._flops_timed = 0.0

    def restart_clock(self) -> None:
        """Excludes the time since the last step (an evaluation and a save) from the step times."""
        now = time.perf_counter()
        self._progress.evaluated(now - self._clock)
        self._clock = now

    def _timing(self) -> dict[str, Any]:
        """Returns throughput, the median step time, the slow steps, and the share of time spent waiting for data."""
        seconds = max(sum(self._seconds), 1e-9)
        median = statistics.median(self._seconds) if self._seconds else None
        slow = [each for each in self._seconds if each > OUTLIER * median]
        return {
            **self._measured.speed.fields(self._tokens_timed / seconds, self._flops_timed / seconds),
            "step_seconds": median,
            "slow_steps": len(slow),
            "slowest_step_seconds": max(self._seconds, default=None),
            "data_wait": self._waited / seconds,
        }

    def _report_nonfinite(self, step: int, loss: float, grad_norm: float) -> None:
        phase, rows = self._measured.phase, self._measured.rows_of(step - 1)
        self._log.append(
            {"phase": phase, "step": step, "nonfinite": {"loss_sum": loss, "grad_norm": grad_norm, **rows}}
        )
        self._tracker.log(phase, {"skipped_steps": self.skipped_steps}, step)
        print(
            f"{phase} {step}/{self._measured.cadence.total}  loss or gradient is not finite: the step is skipped, "
            f"nothing changed ({self.nonfinite_in_a_row} in a row; its rows are in {self._log.path.name})",
            flush=True,
        )


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Tokens and useful FLOPs per second of `model` on `num_devices` devices.

    Useful FLOPs are those of the matmuls that the objective requires, each counted once. docs/training.md lists what
    else is computed.
    """

    model: Any
    num_devices: int

    def flops(self, sums: LossSums) -> float:
        """Returns the useful FLOPs of a step."""
        config, lora = self.model.config, self.model.lora
        return float(train_flops(config, lora, sums.work) + forward_flops(config, None, sums.frozen_work))

    def fields(self, tokens_per_second: float, flops_per_second: float) -> dict[str, Any]:
        """Returns `tokens_per_second` and `mfu` for a line; `mfu` is None if the peak of the device is unknown."""
        share = mfu(flops_per_second, jax.devices()[0].device_kind, self.num_devices)
        return {"tokens_per_second": tokens_per_second, "mfu": share}


def _saved(sums: LossSums) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in vars(sums).items() if value is not None}


def _sums_from(saved: Mapping[str, Any] | None) -> LossSums | None:
    if saved is None:
        return None
    try:
        return LossSums(**{name: np.asarray(value, np.float64) for name, value in saved.items()})
    except TypeError as error:
        raise UserError("the checkpoint is of another version of difflm_jax: choose another output_dir") from error
