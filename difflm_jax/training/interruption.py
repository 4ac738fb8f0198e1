"""Turns SIGTERM and Ctrl-C into a request that the loop reads between steps, at the same step in every process."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether the run has been asked to end. One object serves all phases."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._reached = ""
        self._asked = 0

    def reached(self) -> str:
        """Returns the name of the signal after which nothing new may begin, or "". All processes must call this.

        With several processes, a signal to any of them takes effect at a later call, which jax's coordination service
        chooses. Calls are counted over all phases.
        """
        self._asked += 1
        if jax.process_count() == 1:
            self._reached = self.received
        elif not self._reached and multihost_utils.reached_preemption_sync_point(self._asked):
            self._reached = "SIGTERM"
        return self._reached

    @property
    def received(self) -> str:
        """The name of the signal that this process has received, or "". Always "" with several: see `reached`."""
        return self._received.name if self._received else ""

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once
        self._received = signal.Signals(number)
        print(f"{self._received.name}: saving, then stopping", flush=True)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handles SIGTERM and SIGINT within the block. With several processes, only jax's own listener for SIGTERM does."""
    request = StopRequest()
    listened = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    before = {}
    for number in listened:
        with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
            before[number] = signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
