"""SIGTERM and Ctrl-C become a request that the loop sees between steps, in every process at the same place."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether somebody wants the run to end; one for all its phases."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._reached = ""
        self._asked = 0

    def reached(self) -> str:
        """The name of the signal after which nothing new may begin, or "". All processes ask at the same places.

        With several processes, jax's coordination service agrees on a call that all of them have yet to make,
        whichever of them was signalled. Calls are counted over all phases.
        """
        self._asked += 1
        if jax.process_count() == 1:
            self._reached = self.received
        elif not self._reached and multihost_utils.reached_preemption_sync_point(self._asked):
            self._reached = "SIGTERM"
        return self._reached

    @property
    def received(self) -> str:
        """The name of the signal that this process has received, or "" (with several: jax knows, see `reached`)."""
        return self._received.name if self._received else ""

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second time it is meant at once
        self._received = signal.Signals(number)
        print(f"{self._received.name}: saving, then stopping", flush=True)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens to SIGTERM and SIGINT within the block. With several processes SIGTERM belongs to jax's own listener."""
    request = StopRequest()
    listened = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    before = {}
    for number in listened:
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs it there sees to its signals
            before[number] = signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
