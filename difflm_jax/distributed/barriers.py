"""Barriers that break, in all processes at once, when one of them failed on its way.

A library that saves in the background has its processes meet several times, under a name each time. A process that
failed skips meetings: the next one that it comes to has another name than the one where the others are.
"""

import itertools

import jax
from jax._src import distributed  # the store of the processes that were joined has no public name

from difflm_jax.errors import one_line

_counter = itertools.count()


class BrokenBarrierError(OSError):
    """Another process did not come to this barrier: it failed before."""


class Barriers:
    """The barriers of one operation that every process takes part in, passed in the same order by each.

    Every process makes its objects in the same order. Used as orbax's `barrier_sync_fn`.
    """

    def __init__(self) -> None:
        self._prefix = f"difflm_jax/barriers/{next(_counter)}"
        self._passed = 0
        self._is_broken = False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes. Raises `BrokenBarrierError` in each if they are not all at `key`.

        Raises `TimeoutError` if one does not come.
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
        if jax.process_index() == 0:  # all are here, so all have read what stands at the one before
            client.key_value_delete(f"{self._prefix}/{here - 1}/")
