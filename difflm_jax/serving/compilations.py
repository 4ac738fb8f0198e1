"""How often XLA compiled, from jax's own events: a server that compiles under load is one whose buckets do not fit."""

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts programs that are compiled from now until `close`, by whatever thread."""

    def __init__(self):
        self.count, self._listens = 0, True
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def close(self) -> None:
        """Counts no more; a second time does nothing."""
        if self._listens:
            self._listens = False
            jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, _seconds: float, **_: object) -> None:
        self.count += event == _COMPILED
