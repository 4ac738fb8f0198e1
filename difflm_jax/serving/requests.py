"""What is asked of the engine and what comes back: `Request` in, `Ticket` out, which gives `Update`s, then `Finished`.

Tokens are all that passes between an engine and its callers; text, templates and HTTP are the callers'.
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


class Busy(Exception):  # noqa: N818 - what a server says, not a fault
    """The queue is full, or the engine takes no further requests. `retry_after` seconds is a guess at when it will."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to make. Several answers to one prompt are several requests, told apart by `copy` (0, 1, ...).

    The tokens are those of `lm.generate([tokens] * n, seed=seed, ...)` in row `copy`, or of `lm.infill`.
    """

    model: str  # a name that the engine knows
    tokens: np.ndarray  # [L] int32, the prompt; with `infill` the canvas, whose masks are filled
    sampling: Sampling  # of `sampling_options`, for that model
    infill: bool = False
    max_new_tokens: int = 128  # without meaning for `infill`
    steps: int = 128  # forward passes at most; speculative decoding does not read it
    block_length: int | None = None
    seed: int = 0
    copy: int = 0
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    grammar: Any = None  # of `sampling.grammar`
    drafts: bool = False  # updates carry the canvas as it is now
    logprobs: int | None = None  # candidates with each token; None: no probabilities at all
    time_limit: float | None = None  # seconds from `submit` on, after which the answer ends as "cancelled"


@dataclasses.dataclass(frozen=True)
class TokenProbability:
    """A token when it was committed. `candidates`: (token, log-probability), the likeliest first."""

    token: int
    logprob: float
    candidates: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Draft:
    """The answer as it stands, T columns of it, or of an infilled canvas."""

    tokens: np.ndarray  # [T] int32: committed tokens; elsewhere the likeliest one if a pass looked there, else the mask
    committed: np.ndarray  # [T] bool
    guessed: np.ndarray  # [T] bool; what is neither committed nor guessed is open


@dataclasses.dataclass(frozen=True)
class Update:
    """Where an answer stands. It holds all that earlier updates held: one that nobody read is replaced by the next."""

    tokens: np.ndarray  # [n] int32, the part of the answer that is final from the left, and never changes again
    passes: int  # forward passes so far
    logprobs: tuple[TokenProbability, ...] = ()  # of `tokens`, where the request asks
    draft: Draft | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a request.

    `tokens` are those of `lm.generate`: up to and including one end-of-sequence token, or the one that completes a
    stop string; of `infill` the whole canvas. What was final is kept when a request is cancelled or fails.
    """

    tokens: np.ndarray  # [n] int32
    finish_reason: str  # one of FINISH_REASONS
    prompt_tokens: int
    completion_tokens: int  # of `infill`: masks that were filled
    cached_tokens: int = 0  # tokens of the prompt whose keys and values were there already
    passes: int = 0  # forward passes, without those over the prompt
    algorithm: str = ""
    acceptance: float | None = None  # drafts accepted per verifying pass, on average; None: nothing drafts
    logprobs: tuple[TokenProbability, ...] = ()
    error: str | None = None  # what went wrong, if the reason is "failed"; why, if it is "cancelled"

    @property
    def tokens_per_pass(self) -> float:
        return self.completion_tokens / max(self.passes, 1)


Event = Update | Finished


class Ticket:
    """The answer to one request, as it comes: iterate it in a thread or in an event loop, from one place at a time.

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
        """Ends the work on it; the row is free at the next round. What is finished stays so."""
        with self._changed:
            self._cancelled = self._cancelled or reason

    @property
    def cancelled(self) -> str | None:
        """Why the request shall end, if it shall."""
        return self._cancelled

    def result(self, timeout: float | None = None) -> Finished:
        """Waits for the end. Raises `TimeoutError`."""
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
        """Gives an update; only the engine does."""
        with self._changed:
            self._update = update
            self._notify()

    def finish(self, finished: Finished) -> None:
        """Gives the end, once; only the engine does."""
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
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens there any more
                loop.call_soon_threadsafe(news.set)
