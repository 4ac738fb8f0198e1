"""The engine: one thread owns the device and answers queued requests, many at once.

Callers `submit` a `Request` and read its `Ticket`, from any number of threads and event loops. Requests that can share
forward passes share a table (`continued`, `filled`), whatever their options. They join and leave it between two passes.
A row's tokens do not depend on the others. If a request fails, the others continue.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.batching import check_positive, check_seed
from difflm_jax.sampling.causal import is_plain
from difflm_jax.sampling.options import SPECULATIVE, sampling_options
from difflm_jax.serving.beginnings import Beginnings, Prefill
from difflm_jax.serving.canvas import CanvasRow
from difflm_jax.serving.compilations import Compilations
from difflm_jax.serving.continued import Continued, ContinuedRow
from difflm_jax.serving.family import Family, families
from difflm_jax.serving.filled import Filled
from difflm_jax.serving.requests import Busy, Finished, Request, Ticket
from difflm_jax.serving.table import Table
from difflm_jax.serving.work import Row, Work

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine. `rows`: requests that run at once, over all models; `queue`: requests that wait."""

    rows: int = 8
    queue: int = 64
    cache_bytes: int = 512 << 20  # size of the prefix cache; 0: off
    warmup: bool = False  # compile the programs of short requests before the first request
    chunk: int = 64  # tokens of a prompt per pass, and per entry of the prefix cache


class Engine:
    """Answers requests to `models`, by name. Use it as a context manager, or call `close`."""

    def __init__(self, models: Mapping[str, LanguageModel], options: EngineOptions | None = None):
        self.models, self.options = dict(models), options or EngineOptions()
        self._families = {name: family for family in families(self.models) for name in family.names}
        self._beginnings = Beginnings(self.options.cache_bytes)
        self._compilations = Compilations()
        self._tables: dict[Any, Table] = {}
        self._waiting: collections.deque[Work] = collections.deque()
        self._running: list[Work] = []
        self._changed = threading.Condition()
        self._accepts, self._ends = True, False
        self._counts = dict.fromkeys(("requests", "stop", "length", "cancelled", "failed", "passes", "tokens"), 0)
        self._batches: collections.Counter[int] = collections.Counter()
        self._thread = threading.Thread(target=self._work, name="difflm-engine", daemon=True)
        self._thread.start()
        if self.options.warmup:
            self.warm_up()

    def submit(self, request: Request) -> Ticket:
        """Queues a request. Raises `Busy` if the queue is full, `UserError` for an invalid request."""
        work = self._prepared(request)
        with self._changed:
            if not self._accepts:
                raise Busy("the server is shutting down", retry_after=30.0)
            if not self._has_room():
                raise Busy(f"{len(self._waiting)} requests are waiting already", retry_after=self._guess())
            self._counts["requests"] += 1
            self._waiting.append(work)
            self._changed.notify_all()
        return work.ticket

    def stats(self) -> dict[str, Any]:
        """Returns counts since the start, and the requests waiting and running now.

        `batches`: passes by their number of rows. `cache_asked`, `cache_found`: prompt tokens that were looked up in
        the prefix cache, and those found.
        """
        kept = self._beginnings
        with self._changed:
            return {
                **self._counts,
                "ready": self._accepts and self._has_room(),
                "waiting": len(self._waiting),
                "running": len(self._running),
                "batches": dict(self._batches),
                "compilations": self._compilations.count,
                "cache_asked": kept.asked,
                "cache_found": kept.found,
                "cache_bytes": kept.bytes,
            }

    def warm_up(self) -> None:
        """Compiles the programs of short requests to every model, with 1, 2, 4, ... rows."""
        for name in {family.names[0] for family in self._families.values()}:
            lm = self.models[name]
            sampling = sampling_options(lm.attention, lm.algorithm, {})
            request = Request(name, np.array([lm.pad_token_id], np.int32), sampling)
            rows = 1
            while rows <= self.options.rows:
                tickets = [self.submit(dataclasses.replace(request, copy=copy)) for copy in range(rows)]
                for ticket in tickets:
                    next(iter(ticket))  # everything is compiled after one pass
                    ticket.cancel()
                for ticket in tickets:
                    ticket.result()
                rows *= 2

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    def drain(self, timeout: float | None = None) -> bool:
        """Stops accepting requests and waits for the accepted ones to finish. Returns False on timeout."""
        with self._changed:
            self._accepts = False
            return self._changed.wait_for(lambda: not self._waiting and not self._running, timeout)

    def close(self) -> None:
        """Cancels the remaining requests and ends the thread."""
        with self._changed:
            self._accepts, self._ends = False, True
            for work in (*self._waiting, *self._running):
                work.ticket.cancel("the server is shutting down")
            self._changed.notify_all()
        self._thread.join()
        self._compilations.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # The caller's thread

    def _prepared(self, request: Request) -> Work:
        if request.model not in self.models:
            raise UserError(f"model={request.model!r}: there is none of this name; there are {', '.join(self.models)}")
        lm, family = self.models[request.model], self._families[request.model]
        check_seed(request.seed)
        check_positive("max_new_tokens", request.max_new_tokens)
        if not len(request.tokens):
            raise UserError("a prompt must hold at least one token")
        if request.infill:  # an end of sequence ends an answer, but not a text with gaps
            request = dataclasses.replace(request, sampling=request.sampling.replace(stop_at_eos=False))
        return Work(Ticket(request), lm, family, family.index(request.model), _row(lm, request))

    def _has_room(self) -> bool:
        """Whether a request would get a row or a place in the queue. Requests about to get a row use no place."""
        return len(self._waiting) + len(self._running) < self.options.rows + self.options.queue

    def _guess(self) -> float:
        """Estimates the seconds until the queue is shorter: the mean age of the running requests."""
        times = [time.monotonic() - work.submitted for work in self._running]
        return max(1.0, sum(times) / max(len(times), 1))

    # The engine's thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._ends)
                if self._ends and not self._waiting and not self._running:
                    return
                admitted = self._next()
            for work in admitted:
                self._alone(work, lambda work=work: self._admit(work))
            for key, table in list(self._tables.items()):
                if table.works:
                    self._pass(key, table)

    def _next(self) -> list[Work]:
        """Dequeues requests while there are free rows, and all that are cancelled or late."""
        admitted = []
        for work in list(self._waiting):
            if len(self._running) < self.options.rows or work.why_to_cancel():
                self._waiting.remove(work)
                self._running.append(work)
                admitted.append(work)
        return admitted

    def _admit(self, work: Work) -> None:
        if work.row.done or work.ticket.cancelled:
            finished = work.told()
            if finished is not None:
                self._finish(work, finished)
                return
        self._table(work).admit(work)

    def _pass(self, key: Any, table: Table) -> None:
        works = table.works
        try:
            table.step()
        except Exception as error:  # the cause is unknown: all rows of this pass fail, other tables continue
            log.exception("a forward pass failed")
            del self._tables[key]
            for work in works:
                self._finish(work, work.ended("failed", work.row.final(), f"a forward pass failed: {error}"))
            return
        with self._changed:
            self._counts["passes"] += 1
            self._batches[len(works)] += 1
        for work in works:
            self._alone(work, lambda work=work: self._told(work, table))

    def _told(self, work: Work, table: Table) -> None:
        finished = work.told()
        if finished is not None:
            table.release(work)
            self._finish(work, finished)

    def _alone(self, work: Work, action: Any) -> None:
        """Runs `action` for one request. If it raises, only this request fails."""
        try:
            action()
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a request failed")
            for table in self._tables.values():
                if work in table.slots:
                    table.slots[table.slots.index(work)] = None
            self._finish(work, work.ended("failed", np.zeros(0, np.int32), str(error)))

    def _finish(self, work: Work, finished: Finished) -> None:
        with self._changed:
            self._running.remove(work)
            self._counts[finished.finish_reason] += 1
            self._counts["tokens"] += finished.completion_tokens
            self._changed.notify_all()
        work.ticket.finish(finished)

    def _table(self, work: Work) -> Table:
        """Returns the table that can run a request; creates it if needed."""
        row, family = work.row, work.family
        kind = row.drafting if isinstance(row, ContinuedRow) else (row.mode, row.width, row.is_guided)
        key = (id(family), kind)
        if key not in self._tables:
            rows = self.options.rows
            if isinstance(row, ContinuedRow):
                self._tables[key] = Continued(self._prefill(family, is_adapted=False), row.drafting, rows)
            else:
                self._tables[key] = Filled(self._prefill(family, is_adapted=True), *kind, rows)
        return self._tables[key]

    def _prefill(self, family: Family, is_adapted: bool) -> Prefill:
        diffusion = family.weights.decoder.diffusion
        block = diffusion.block_length if diffusion.blocks_include_prompt else 1
        chunk = -(-self.options.chunk // block) * block
        owner = repr((id(family.weights.decoder.variables["params"]), is_adapted, is_adapted and id(family))).encode()
        return Prefill(family.weights, self._beginnings, chunk, is_adapted, owner)


def _row(lm: LanguageModel, request: Request) -> Row:
    """Returns the row of a request, for the loop that `lm.generate` would use. Raises `UserError`."""
    if request.sampling.verify is not None:
        raise UserError("verify: this server does not verify by a base yet; lm.generate(verify='base') does")
    if request.infill:
        return CanvasRow(lm, request)
    if request.sampling.algorithm == SPECULATIVE or is_plain(lm.decoder, request.sampling):
        return ContinuedRow(lm, request)
    return CanvasRow(lm, request)
