"""Counts XLA compilations, from jax's own events. A server that compiles under load has unsuitable buckets."""

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts the programs that any thread compiles from now until `close`."""

    def __init__(self):
        self.count, self._listens = 0, True
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def close(self) -> None:
        """Stops counting. A second call has no effect."""
        if self._listens:
            self._listens = False
            jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, _seconds: float, **_: object) -> None:
        self.count += event == _COMPILED
