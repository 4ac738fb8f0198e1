"""A request on its way: what the engine's thread knows of it, where its answer ends, and what its ticket is told."""

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
    """A row of a table: what a kind of decoding knows of a request. Tables change it after every pass."""

    passes = 0
    cached = 0  # tokens of the prompt whose columns were kept
    done = False
    error: str | None = None
    acceptance: float | None = None
    logprobs: tuple[TokenProbability, ...] = ()  # of `final`, at least

    def final(self) -> np.ndarray:
        """The tokens of the answer that are final from the left."""
        raise NotImplementedError

    def answer(self) -> np.ndarray:
        """The whole answer of a row that is done, before it is cut."""
        raise NotImplementedError

    def draft(self) -> Draft:
        """The answer as it stands."""
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
        """Tells the ticket where the row stands; the end, once there is one, is left to the caller to tell."""
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
        """The end of the request."""
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
        """Why the request shall end before its answer does, if it shall."""
        limit = self.request.time_limit
        if limit is not None and time.monotonic() - self.submitted > limit:
            self.ticket.cancel(f"the time limit of {limit:g} s is over")
        return self.ticket.cancelled

    def _cut(self, final: np.ndarray) -> np.ndarray | None:
        """The answer up to where it ends, if it ends within `final`. What was examined before is not examined again."""
        new = final[self._examined :]
        ends = bool(np.isin(new, self._ends).any())
        if not ends and self._stops and len(new):
            # A stop string may begin in tokens that were seen before. Each of them has at least one byte, except for
            # special tokens: a whole answer is therefore examined whole.
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
    """[2] uint32: the key of `row` as `generate` makes it, for the copy that the request names."""
    keys = row_keys(request.seed, [row] * (request.copy + 1))
    return np.asarray(jax.random.key_data(keys[request.copy]))
