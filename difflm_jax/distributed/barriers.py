"""Barriers that fail in all processes at once if one process failed before it reached them.

A library that saves in the background synchronises its processes at several named barriers. A process that failed skips
some of them: the next barrier that it reaches has a different name from the one where the others wait.
"""

import itertools

import jax
from jax._src import distributed  # the key-value store has no public API

from difflm_jax.errors import one_line

_counter = itertools.count()


class BrokenBarrierError(OSError):
    """Another process failed before it reached this barrier."""


class Barriers:
    """The barriers of one operation that all processes take part in. Pass it to orbax as `barrier_sync_fn`.

    All processes must create their objects, and reach the barriers, in the same order.
    """

    def __init__(self) -> None:
        self._prefix = f"difflm_jax/barriers/{next(_counter)}"
        self._passed = 0
        self._is_broken = False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes. Raises `BrokenBarrierError` in each of them if they are not all at `key`.

        Raises `TimeoutError` if a process does not arrive within `timeout_ms`.
        """
        if jax.process_count() == 1:
            return
        if self._is_broken:
            raise BrokenBarrierError("another process failed")
        client = distributed.global_state.client
        here = self._passed
        place, self._passed = f"{self._prefix}/{here}", here + 1
        client.key_value_increment(f"{place}/{key}", 1)
        try:
            client.wait_at_barrier(place, timeout_ms)
        except RuntimeError as error:
            raise TimeoutError(f"another process did not come ({one_line(error)[:100]})") from error
        if int(client.key_value_try_get(f"{place}/{key}")) < jax.process_count():
            self._is_broken = True
            raise BrokenBarrierError("another process failed")
        if jax.process_index() == 0:  # all are here, so all have read the previous barrier's keys
            client.key_value_delete(f"{self._prefix}/{here - 1}/")
