"""Watching a long run from outside: a heartbeat file, peaks of memory, and a profile of chosen steps."""

import datetime
import json
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax

from difflm_jax.distributed.processes import is_writer

HEARTBEAT_FILE = "heartbeat.json"


def memory_peaks() -> dict[str, int | None]:
    """`host_memory_peak`: bytes this process has had resident at most; `device_memory_peak`: bytes of the fullest
    local device, None where the backend does not count (CPU)."""
    kilobyte = 1 if sys.platform == "darwin" else 1024
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return {
        "host_memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte,
        "device_memory_peak": max((peak for peak in peaks if peak is not None), default=None),
    }


class Heartbeat:
    """`output_dir/heartbeat.json`, replaced at most every `seconds` (0: never): a run whose file is old is stuck.

    It is written by the training loop itself, not by a thread, which would go on beating while the loop hangs.
    """

    def __init__(self, directory: str | Path, seconds: float):
        self._path = Path(directory) / HEARTBEAT_FILE
        self._seconds = seconds
        self._last = float("-inf")

    def beat(self, phase: str, step: int, total: int, doing: str) -> None:
        """Says where the run is and what it is `doing` ("training", "evaluating", ...), if it is time to."""
        now = time.monotonic()
        if not is_writer() or not self._seconds or now - self._last < self._seconds:
            return
        self._last = now
        record = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "phase": phase,
            "step": step,
            "total_steps": total,
            "doing": doing,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **memory_peaks(),
        }
        unfinished = self._path.with_suffix(".part")
        try:
            unfinished.write_text(json.dumps(record) + "\n", encoding="utf-8")
            unfinished.replace(self._path)
        except OSError:  # a full disk: the file grows old, which is what it is there to show
            unfinished.unlink(missing_ok=True)


class Profile:
    """A `jax.profiler` trace of `steps` steps from `first` (counted from 1) on, into `directory`; 0 steps: none."""

    def __init__(self, directory: str | Path, first: int, steps: int):
        self._directory, self._first, self._last = Path(directory), first, first + steps - 1
        self._running = False

    def before(self, step: int) -> None:
        """Call before step number `step` is started."""
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Call when step number `step` has been started; `result` is what it returns."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile: wrote {self._directory} (open it with xprof or Perfetto)", flush=True)
