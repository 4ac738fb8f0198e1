"""A request in progress: its state in the engine's thread, the end of its answer, and the updates of its ticket."""

import dataclasses
import time

import jax
import numpy as np

from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.batching import row_keys
from difflm_jax.sampling.text import cut_answer, stop_strings
from difflm_jax.serving.family import Family
from difflm_jax.serving.requests import Draft, Finished, Request, Ticket, TokenProbability, Update

_MOST_BYTES = 4  # of a character


class Row:
    """A row of a table: the decoding state of a request. Tables update it after every pass."""

    passes = 0
    cached = 0  # prompt tokens found in the prefix cache
    done = False
    error: str | None = None
    acceptance: float | None = None
    logprobs: tuple[TokenProbability, ...] = ()  # of `final`, at least

    def final(self) -> np.ndarray:
        """Returns the left part of the answer that is final."""
        raise NotImplementedError

    def answer(self) -> np.ndarray:
        """Returns the whole answer of a finished row, before it is cut."""
        raise NotImplementedError

    def draft(self) -> Draft:
        """Returns the current state of the answer."""
        raise NotImplementedError


@dataclasses.dataclass(eq=False)
class Work:
    """A ticket, the model that answers it, and its row."""

    ticket: Ticket
    lm: LanguageModel
    family: Family
    index: int  # of the model in its family
    row: Row
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    _examined: int = 0

    @property
    def request(self) -> Request:
        return self.ticket.request

    def __post_init__(self):
        self._stops, stop_ids = stop_strings(self.request.stop, self.lm.tokenizer)
        self._ends = np.array([*self.lm.eos_token_ids, *stop_ids], np.int32)

    def told(self) -> Finished | None:
        """Sends the row's progress to the ticket. If the request has ended, returns its end, which the caller sends."""
        row, request = self.row, self.request
        if row.error is not None:
            return self.ended("failed", row.final(), row.error)
        reason = self.why_to_cancel()
        if reason is not None:
            final = row.final()
            return self.ended("cancelled", final if request.infill else self._up_to_end(final), reason)
        if request.infill:
            return self.ended("stop", row.answer()) if row.done else self._tell(row.final())
        final = row.answer() if row.done else row.final()
        cut = self._cut(final)
        if cut is not None:
            return self.ended("stop", cut)
        if row.done:
            return self.ended("length", final)
        return self._tell(final)

    def ended(self, reason: str, tokens: np.ndarray, error: str | None = None) -> Finished:
        """Builds the end of the request."""
        row, request = self.row, self.request
        count = len(tokens)
        if request.infill:
            masks = request.tokens == self.lm.mask_token_id
            count = int(masks.sum()) if reason == "stop" else int(masks[:count].sum())
        return Finished(
            tokens=tokens,
            finish_reason=reason,
            prompt_tokens=len(request.tokens),
            completion_tokens=count,
            cached_tokens=row.cached,
            passes=row.passes,
            algorithm=request.sampling.algorithm or "",
            acceptance=row.acceptance,
            logprobs=row.logprobs[: len(tokens)],
            error=error,
        )

    def _tell(self, final: np.ndarray) -> None:
        draft = self.row.draft() if self.request.drafts else None
        if draft is None and len(final) == self._examined and self._examined:
            return
        self._examined = len(final)
        self.ticket.tell(Update(final, self.row.passes, self.row.logprobs[: len(final)], draft))

    def why_to_cancel(self) -> str | None:
        """Returns the reason to end the request early, if there is one. Checks the time limit."""
        limit = self.request.time_limit
        if limit is not None and time.monotonic() - self.submitted > limit:
            self.ticket.cancel(f"the time limit of {limit:g} s is over")
        return self.ticket.cancelled

    def _cut(self, final: np.ndarray) -> np.ndarray | None:
        """Returns the answer cut at its end; None if it does not end within `final`. Examines only new tokens."""
        new = final[self._examined :]
        ends = bool(np.isin(new, self._ends).any())
        if not ends and self._stops and len(new):
            # A stop string may begin in earlier tokens, so look back. Tokens have at least one byte, except for
            # special ones; a finished answer is therefore examined whole.
            back = _MOST_BYTES * (max(map(len, self._stops)) + 2)
            text = self._decode(final[0 if self.row.done else max(0, self._examined - back) :])
            ends = any(stop in text for stop in self._stops) and any(
                stop in self._decode(final) for stop in self._stops
            )
        return cut_answer(final, self._ends, self._stops, self._decode)[1] if ends else None

    def _up_to_end(self, final: np.ndarray) -> np.ndarray:
        return cut_answer(final, self._ends, (), self._decode)[1]

    def _stops_in(self, tokens: np.ndarray) -> bool:
        text = self._decode(tokens)
        return any(stop in text for stop in self._stops)

    def _decode(self, tokens: np.ndarray) -> str:
        return self.lm.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def key_of(request: Request, row: np.ndarray) -> np.ndarray:
    """[2] uint32: the key of `row` as in `generate`, for the request's `copy`."""
    keys = row_keys(request.seed, [row] * (request.copy + 1))
    return np.asarray(jax.random.key_data(keys[request.copy]))
