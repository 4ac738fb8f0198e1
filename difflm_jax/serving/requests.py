"""The engine's interface: a `Request` goes in, a `Ticket` comes out; it yields `Update`s, then a `Finished`.

An engine and its callers exchange only tokens. Callers handle text, templates and HTTP.
"""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np

from difflm_jax.sampling.options import Sampling

FINISH_REASONS = ("stop", "length", "cancelled", "failed")


class Busy(Exception):  # noqa: N818 - a state of the server, not a fault
    """Raised if the queue is full or the engine is closing. `retry_after`: estimated seconds until it has room."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for one answer. Several answers to one prompt are several requests that differ in `copy` (0, 1, ...).

    The answer equals row `copy` of `lm.generate([tokens] * n, seed=seed, ...)`, or of `lm.infill`.
    """

    model: str  # name of a model of the engine
    tokens: np.ndarray  # [L] int32, the prompt; with `infill` the canvas, whose masks are filled
    sampling: Sampling  # from `sampling_options`, for that model
    infill: bool = False
    max_new_tokens: int = 128  # ignored by `infill`
    steps: int = 128  # maximum forward passes; ignored by speculative decoding
    block_length: int | None = None
    seed: int = 0
    copy: int = 0
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, value added to its logit)
    grammar: Any = None  # a `Grammar` of `sampling.grammar`
    drafts: bool = False  # whether updates include the current canvas
    logprobs: int | None = None  # candidates per token; None: no probabilities
    time_limit: float | None = None  # seconds after `submit` until the answer ends as "cancelled"


@dataclasses.dataclass(frozen=True)
class TokenProbability:
    """A token and its log-probability when committed. `candidates`: (token, log-probability), most likely first."""

    token: int
    logprob: float
    candidates: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Draft:
    """The current state of an answer, or of an infilled canvas, of T columns."""

    tokens: np.ndarray  # [T] int32: committed tokens; elsewhere the most likely token if known, else the mask
    committed: np.ndarray  # [T] bool
    guessed: np.ndarray  # [T] bool; columns neither committed nor guessed are open


@dataclasses.dataclass(frozen=True)
class Update:
    """The progress of an answer. It includes all earlier updates, so an unread one is replaced by the next."""

    tokens: np.ndarray  # [n] int32, the left part of the answer that is final
    passes: int  # forward passes so far
    logprobs: tuple[TokenProbability, ...] = ()  # of `tokens`, if requested
    draft: Draft | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a request.

    `tokens` are those of `lm.generate`, up to and including an end-of-sequence token or the token that completes a stop
    string. For `infill` they are the whole canvas. A request that is cancelled or fails keeps its final tokens.
    """

    tokens: np.ndarray  # [n] int32
    finish_reason: str  # one of FINISH_REASONS
    prompt_tokens: int
    completion_tokens: int  # for `infill`: masks that were filled
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    passes: int = 0  # forward passes, without those over the prompt
    algorithm: str = ""
    acceptance: float | None = None  # mean drafts accepted per verifying pass; None: no drafts
    logprobs: tuple[TokenProbability, ...] = ()
    error: str | None = None  # the message, if the reason is "failed" or "cancelled"

    @property
    def tokens_per_pass(self) -> float:
        return self.completion_tokens / max(self.passes, 1)


Event = Update | Finished


class Ticket:
    """A stream of events of one request. Iterate it in a thread or in an event loop, with one reader at a time.

    The last item is a `Finished`. An `Update` that was not read in time is replaced by the next one.
    """

    def __init__(self, request: Request):
        self.request = request
        self._changed = threading.Condition()
        self._update: Update | None = None
        self._finished: Finished | None = None
        self._cancelled: str | None = None
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self, reason: str = "cancelled by the caller") -> None:
        """Cancels the request; its row is freed after the current pass. No effect on a finished one."""
        with self._changed:
            self._cancelled = self._cancelled or reason

    @property
    def cancelled(self) -> str | None:
        """The reason for which the request was cancelled; None if it was not."""
        return self._cancelled

    def result(self, timeout: float | None = None) -> Finished:
        """Waits for the end and returns it. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished is not None, timeout):
                raise TimeoutError("the request is not finished")
            return self._finished

    @property
    def done(self) -> bool:
        return self._finished is not None

    def __iter__(self) -> Iterator[Event]:
        event: Event | None = None
        while not isinstance(event, Finished):
            with self._changed:
                self._changed.wait_for(self._has_news)
                event = self._take()
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        news = asyncio.Event()
        with self._changed:
            self._listener = (asyncio.get_running_loop(), news)
        event: Event | None = None
        while not isinstance(event, Finished):
            with self._changed:
                news.clear()
                event = self._take() if self._has_news() else None
            if event is None:
                await news.wait()
            else:
                yield event

    # The engine's side

    def tell(self, update: Update) -> None:
        """Publishes an update. Only the engine calls this."""
        with self._changed:
            self._update = update
            self._notify()

    def finish(self, finished: Finished) -> None:
        """Publishes the end; later calls have no effect. Only the engine calls this."""
        with self._changed:
            if self._finished is None:
                self._finished = finished
                self._notify()

    def _has_news(self) -> bool:
        return self._update is not None or self._finished is not None

    def _take(self) -> Event:
        if self._update is not None:
            event, self._update = self._update, None
            return event
        return self._finished

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._listener is not None:
            loop, news = self._listener
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is no reader any more
                loop.call_soon_threadsafe(news.set)
