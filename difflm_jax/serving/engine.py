"""The engine: one thread owns the device and answers the requests of a queue.

Callers `submit` a `Request` and read its `Ticket`; any number of threads and event loops may. A request that cannot be
answered fails alone.
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.options import SPECULATIVE, Sampling
from difflm_jax.sampling.watch import Pass
from difflm_jax.serving.requests import Busy, Finished, Request, Ticket, Update

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on. `rows`: requests that run at once; `queue`: those that wait."""

    rows: int = 8
    queue: int = 64
    cache_bytes: int = 512 << 20  # of kept beginnings; 0: none are kept
    warmup: bool = False  # compiles at the start what requests will need


class Engine:
    """Answers requests to `models`. Use as a context manager, or call `close`."""

    def __init__(self, models: Mapping[str, LanguageModel], options: EngineOptions = EngineOptions()):
        self.models, self.options = dict(models), options
        self._waiting: deque[tuple[Ticket, float]] = deque()
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._accepts, self._ends = True, False
        self._counts = {"requests": 0, "finished": 0, "cancelled": 0, "failed": 0, "passes": 0, "tokens": 0}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        """Queues a request. Raises `Busy` if the queue is full, `UserError` for what cannot be answered."""
        if request.model not in self.models:
            raise UserError(f"model={request.model!r}: there is none of this name; there are {', '.join(self.models)}")
        ticket = Ticket(request)
        with self._changed:
            if not self._accepts:
                raise Busy("the server is shutting down", retry_after=30.0)
            if len(self._waiting) >= self.options.queue:
                raise Busy(f"{len(self._waiting)} requests are waiting already")
            self._counts["requests"] += 1
            self._waiting.append((ticket, time.monotonic()))
            self._changed.notify_all()
        return ticket

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what is waiting and running now."""
        with self._changed:
            return {**self._counts, "waiting": len(self._waiting), "running": len(self._running)}

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no further requests and waits for those that it has; False if the time was too short."""
        with self._changed:
            self._accepts = False
            return self._changed.wait_for(lambda: not self._waiting and not self._running, timeout)

    def close(self) -> None:
        """Cancels what is left, and ends the thread."""
        with self._changed:
            self._accepts, self._ends = False, True
            for ticket in (*[ticket for ticket, _ in self._waiting], *self._running):
                ticket.cancel("the server is shutting down")
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if not self._waiting:
                    return
                ticket, submitted = self._waiting.popleft()
                self._running.append(ticket)
            try:
                finished = self._answer(ticket, submitted)
            except Exception as error:  # whatever it is, others go on
                log.exception("a request failed")
                finished = self._ended(ticket, np.zeros(0, np.int32), "failed", 0, str(error))
            with self._changed:
                self._running.remove(ticket)
                self._counts["finished"] += 1
                self._counts["passes"] += finished.passes
                self._counts["tokens"] += finished.completion_tokens
                self._changed.notify_all()
            ticket.finish(finished)

    def _answer(self, ticket: Ticket, submitted: float) -> Finished:
        request = ticket.request
        lm = self.models[request.model]
        ends, last = set(lm.eos_token_ids), [np.zeros(0, np.int32), 0]

        def watch(seen: Pass) -> None:
            if request.time_limit is not None and time.monotonic() - submitted > request.time_limit:
                ticket.cancel(f"the time limit of {request.time_limit:g} s is over")
            tokens = seen.tokens[0]
            known = tokens != lm.mask_token_id
            count = len(tokens) if known.all() else int(known.argmin())
            last[:] = tokens[:count], seen.number
            ticket.tell(Update(tokens[:count].copy(), seen.number))
            if ticket.cancelled:
                raise _CancelledError

        options = {
            field.name: getattr(request.sampling, field.name)
            for field in dataclasses.fields(Sampling)
            if getattr(request.sampling, field.name) != field.default and field.name not in ("temperature", "schedule")
        }
        options["temperature"] = request.sampling.temperature or 0.0
        observed = None if request.sampling.algorithm == SPECULATIVE else watch
        given = {"steps": request.steps, "seed": request.seed, "on_pass": observed, **options}
        try:
            if ticket.cancelled:
                raise _CancelledError
            if request.infill:
                answer = lm.infill([request.tokens], **given)
            else:
                given |= {"block_length": request.block_length, "stop": request.stop}
                answer = lm.generate([request.tokens], request.max_new_tokens, **given)
        except _CancelledError:
            return self._ended(ticket, last[0], "cancelled", last[1], ticket.cancelled)
        tokens, passes = answer.tokens[0], int(answer.steps[0])
        stopped = len(tokens) and (int(tokens[-1]) in ends or len(tokens) < request.max_new_tokens)
        return self._ended(ticket, tokens, "stop" if request.infill or stopped else "length", passes)

    def _ended(self, ticket: Ticket, tokens: np.ndarray, reason: str, passes: int, error: str | None = None):
        request = ticket.request
        count = len(tokens)
        if request.infill:
            count = int((request.tokens == self.models[request.model].mask_token_id).sum())
        return Finished(
            tokens, reason, len(request.tokens), count, 0, passes, request.sampling.algorithm or "", error=error
        )


class _CancelledError(Exception):
    pass
