"""How often XLA compiled, from jax's own events: a server that compiles under load is one whose buckets do not fit."""

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts programs that are compiled from now until `close`, by whatever thread."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, _seconds: float, **_: object) -> None:
        self.count += event == _COMPILED
