"""Duties of the loop around every step: the protocol, a heartbeat file, and a profile of chosen steps.

`difflm_jax.training.meter` is another duty.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from difflm_jax.distributed.processes import is_writer
from difflm_jax.errors import UserError
from difflm_jax.utils.files import write_whole

HEARTBEAT_FILE = "heartbeat.json"


def memory_peaks() -> dict[str, int | None]:
    """Returns peaks in bytes: `host_memory_peak` of this process, and `device_memory_peak` of the fullest local device.

    The latter is None on backends that do not report it (CPU).
    """
    kilobyte = 1 if sys.platform == "darwin" else 1024
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return {
        "host_memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte,
        "device_memory_peak": max((peak for peak in peaks if peak is not None), default=None),
    }


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The metrics of a step, which may still be computing, and the seconds that it waited for its data."""

    metrics: Mapping[str, Any]
    waited: float = 0.0


class Duty(Protocol):
    """Something that the loop does around every step. Steps count from 1."""

    def before(self, step: int) -> None:
        """Called before `step` is started."""

    def after(self, step: int, result: StepResult) -> None:
        """Called after `step` was started."""

    def close(self) -> None:
        """Called when the loop ends, also by an error."""


class Duties:
    """Runs several duties as one, in the given order."""

    def __init__(self, *duties: Duty):
        self._duties = duties

    def before(self, step: int) -> None:
        """See `Duty`."""
        for duty in self._duties:
            duty.before(step)

    def after(self, step: int, result: StepResult) -> None:
        """See `Duty`."""
        for duty in self._duties:
            duty.after(step, result)

    def close(self) -> None:
        """See `Duty`."""
        for duty in self._duties:
            duty.close()


class Heartbeat:
    """A duty: replaces `output_dir/heartbeat.json` at most every `seconds` (0: never). An old file means a stuck run.

    The training loop itself writes it. A thread would continue to write while the loop hangs.
    """

    def __init__(self, directory: str | Path, seconds: float, phase: str, total: int):
        self._path = Path(directory) / HEARTBEAT_FILE
        self._seconds, self._phase, self._total = seconds, phase, total
        self._last = float("-inf")

    def before(self, step: int) -> None:
        """See `Duty`."""
        self.beat(step - 1, "training")

    def after(self, step: int, result: StepResult) -> None:
        """Does nothing: see `Duty`."""

    def close(self) -> None:
        """Does nothing: see `Duty`."""

    def beat(self, step: int, doing: str) -> None:
        """Writes the step and what the run is `doing` ("training", ...), if the last beat is old enough."""
        now = time.monotonic()
        if not is_writer() or not self._seconds or now - self._last < self._seconds:
            return
        self._last = now
        record = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "phase": self._phase,
            "step": step,
            "total_steps": self._total,
            "doing": doing,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **memory_peaks(),
        }
        with contextlib.suppress(UserError):  # disk full: the file grows old, as for a stuck run
            write_whole(self._path, json.dumps(record) + "\n")


class Profile:
    """A duty: writes a `jax.profiler` trace of `steps` steps from `first` on to `directory`; none if `steps` is 0."""

    def __init__(self, directory: str | Path, first: int, steps: int):
        self._directory, self._first, self._last = Path(directory), first, first + steps - 1
        self._running = False

    def before(self, step: int) -> None:
        """See `Duty`."""
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, result: StepResult) -> None:
        """See `Duty`."""
        if self._running and step >= self._last:
            jax.block_until_ready(result.metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile: wrote {self._directory} (open it with xprof or Perfetto)", flush=True)
