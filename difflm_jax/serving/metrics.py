"""Prometheus metrics: requests by route and status, seconds, tokens, and the engine's counts."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from difflm_jax.serving.requests import Event, Finished

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_PASS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """The metrics of one server; `stats` returns those of its engine."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]):
        self._registry = CollectorRegistry()
        here = {"registry": self._registry}
        self._requests = Counter("difflm_requests", "Requests by route and status.", ("route", "status"), **here)
        self._seconds = Histogram(
            "difflm_request_seconds", "Seconds of a request.", ("route",), buckets=_SECONDS, **here
        )
        self._first = Histogram(
            "difflm_time_to_first_token_seconds", "Seconds to the first token.", buckets=_SECONDS, **here
        )
        self._tokens = Counter("difflm_tokens", "Tokens of finished requests.", ("kind",), **here)
        self._per_pass = Histogram(
            "difflm_tokens_per_pass", "Tokens of an answer per forward pass.", buckets=_PER_PASS, **here
        )
        self._reasons = Counter("difflm_answers", "Answers by why they ended.", ("reason",), **here)
        self._registry.register(_EngineStats(stats))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Records an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def watcher(self) -> Callable[[Event], None]:
        """Returns a callback for the events of one request; call it when the request starts."""
        start, is_first = time.monotonic(), True

        def seen(event: Event) -> None:
            nonlocal is_first
            if is_first and len(event.tokens):
                is_first = False
                self._first.observe(time.monotonic() - start)
            if isinstance(event, Finished):
                self._finished(event)

        return seen

    def _finished(self, finished: Finished) -> None:
        self._reasons.labels(finished.finish_reason).inc()
        self._tokens.labels("prompt").inc(finished.prompt_tokens)
        self._tokens.labels("cached").inc(finished.cached_tokens)
        self._tokens.labels("answer").inc(finished.completion_tokens)
        if finished.passes:
            self._per_pass.observe(finished.tokens_per_pass)


class _EngineStats:
    """Collects the engine's counts, each number as a gauge."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]):
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        for name, value in self._stats().items():
            about = (f"difflm_engine_{name}", f"{name} of the engine".replace("_", " "))
            if isinstance(value, (int, float)):
                yield GaugeMetricFamily(*about, value)
            elif isinstance(value, Mapping):  # passes by rows
                counts = GaugeMetricFamily(*about, labels=["rows"])
                for rows, count in value.items():
                    counts.add_metric([str(rows)], count)
                yield counts
