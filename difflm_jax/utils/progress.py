"""Progress of long operations on stderr: a bar on a terminal, lines in a log, nothing within the first two seconds."""

import functools
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

import jax

_NEVER = 1e6
# Shorter operations show nothing. DIFFLM_PROGRESS=0 shows nothing at all, for programs that compare stderr.
QUIET_SECONDS = _NEVER if os.environ.get("DIFFLM_PROGRESS") == "0" else 2.0
LINE_SECONDS = 30.0  # between two lines of a log
_COMPILING = "/jax/compilation_cache/compile_requests_use_cache"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Progress:
    """A context manager that counts `advance` towards `total` (None: unknown) and shows it after `QUIET_SECONDS`.

    `what` names the work and `unit` the things counted, such as "loading base" and "tensors". A total of 0 or 1 shows
    nothing.
    """

    def __init__(self, what: str, unit: str, total: int | None = None):
        self._what, self._unit, self._total = what, unit, total
        self._done, self._lock, self._bar = 0, threading.Lock(), None
        self._timer = threading.Timer(QUIET_SECONDS, self._show)
        self._timer.daemon = True
        self._closed, self._shown, self._began = False, None, time.monotonic()

    def __enter__(self) -> "Progress":
        if self._total is None or self._total > 1:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._bar is not None:
                self._bar.stop()
            elif self._shown is not None and error is None:
                self._line()

    def advance(self, count: int = 1) -> None:
        """Adds `count` to what is done."""
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.advance(self._bar.task_ids[0], count)
            elif self._shown is not None and time.monotonic() - self._shown >= LINE_SECONDS:
                self._line()

    def _show(self) -> None:
        with self._lock:
            if self._closed:
                return
            if sys.stderr.isatty():
                self._bar = self._started_bar()
            else:
                self._line()

    def _started_bar(self) -> Any:
        from rich import progress  # slow to import, and most commands show no bar
        from rich.console import Console

        columns = [progress.TextColumn("{task.description}", markup=False), progress.BarColumn()]
        columns += [progress.MofNCompleteColumn(), progress.TextColumn(self._unit, markup=False)]
        columns += [progress.TimeElapsedColumn(), progress.TimeRemainingColumn()]
        console = Console(file=sys.stderr)
        bar = progress.Progress(
            *columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty(), get_time=time.monotonic
        )
        bar.add_task(self._what, total=self._total, completed=self._done)
        bar.tasks[0].start_time = self._began  # the work began before its bar
        bar.start()
        return bar

    def _line(self) -> None:
        of = "" if self._total is None else f" of {self._total:,}"
        seconds = time.monotonic() - self._began
        print(f"{self._what}: {self._done:,}{of} {self._unit}, {seconds:.0f} s", file=sys.stderr, flush=True)
        self._shown = time.monotonic()


@functools.cache
def announce_compilation() -> None:
    """From now on, prints a line to stderr when the compilation of a program has taken `QUIET_SECONDS`."""
    waiting: list[threading.Timer] = []

    def began(event: str, **_: Any) -> None:
        if event == _COMPILING:
            waiting.append(threading.Timer(QUIET_SECONDS, _say_compiling))
            waiting[-1].daemon = True
            waiting[-1].start()

    def ended(event: str, _seconds: float, **_: Any) -> None:
        if event == _COMPILED and waiting:
            waiting.pop().cancel()

    jax.monitoring.register_event_listener(began)
    jax.monitoring.register_event_duration_secs_listener(ended)


def _say_compiling() -> None:
    print("compiling a program (kept for the next start)", file=sys.stderr, flush=True)
