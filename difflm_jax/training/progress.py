"""Terminal output while a phase trains: lines in the first steps and then from time to time, with the ETA."""

import collections
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from difflm_jax.diffusion.objective import LossSums
from difflm_jax.evaluation.masked import add_sums, summarise
from difflm_jax.training.cadence import Cadence

FIRST_STEPS = (1, 2, 5, 10, 20, 50, 100)  # steps of this process after which a line is shown
SHOW_SECONDS = 60.0  # later a line is shown when the last one is older than this
_RECENT_STEPS = 50


class Progress:
    """Measures steps and evaluations, and prints the progress of a phase. It writes nothing to a file.

    The ETA is wall time: the remaining steps at the median time of recent steps, plus the remaining evaluations. The
    first step of a process, which compiles, is ignored. An evaluation counts as the fastest so far, and before the
    first one as `Cadence.evaluation_steps` steps.
    """

    def __init__(self, phase: str, cadence: Cadence):
        self._phase, self._cadence = phase, cadence
        self._steps = 0  # of this process
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT_STEPS)
        self._evaluation = math.inf
        self._start_window()

    def add(self, sums: LossSums | None, seconds: float, tokens: float) -> None:
        """Adds a step. `sums` is None if it was not finite."""
        self._steps += 1
        if self._steps > 1:
            self._recent.append(seconds)
        self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        if sums is not None:
            self._sums = add_sums(self._sums, sums)

    def evaluated(self, seconds: float) -> None:
        """Adds the seconds of an evaluation with its samples and its checkpoint."""
        self._evaluation = min(self._evaluation, seconds)

    def seconds_left(self, step: int) -> float | None:
        """Returns the wall time from the end of `step` to the end of the phase; None if it is not known yet."""
        if not self._recent:
            return 0.0 if step >= self._cadence.total else None
        each = statistics.median(self._recent)
        evaluation = self._evaluation if math.isfinite(self._evaluation) else each * self._cadence.evaluation_steps
        return (self._cadence.total - step) * each + self._cadence.evaluations_after(step) * evaluation

    def show_if_due(self, step: int) -> None:
        """Prints a line in the first steps, and when the last line is old."""
        if self._sums is None:
            return
        if self._steps in FIRST_STEPS or time.monotonic() - self._shown >= SHOW_SECONDS:
            speed = self._tokens / max(self._seconds, 1e-9)
            self.show({"phase": self._phase, "step": step, **summarise(self._sums), "tokens_per_second": speed})

    def show(self, record: Mapping[str, Any]) -> None:
        """Prints the progress line of a metrics record."""
        line = progress_line(record, self._cadence.total, self.seconds_left(record["step"]))
        print(line, flush=True)
        self._start_window()

    def _start_window(self) -> None:
        self._sums, self._seconds, self._tokens, self._shown = None, 0.0, 0.0, time.monotonic()


def progress_line(record: Mapping[str, Any], total_steps: int, seconds_left: float | None) -> str:
    """Returns a line with phase, step of total, loss, masked NLL, tokens per second and ETA."""
    return (
        f"{record['phase']} {record['step']}/{total_steps}"
        f"  loss {_number(record.get('loss'), '.4f')}"
        f"  masked_nll {_number(record.get('masked_nll'), '.4f')}"
        f"  {_number(record.get('tokens_per_second'), ',.0f')} tokens/s"
        f"  ETA {_duration(seconds_left)}"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
