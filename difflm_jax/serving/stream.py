"""Answers as server-sent events: chunks in OpenAI's format and, on request, the canvas between them.

The concatenated deltas are the answer. A draft is a valid chunk with an empty delta; its `diffusion` object has our
additions to the format. An error ends the stream as a chunk with `error`, which OpenAI's clients raise.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from difflm_jax.serving.answers import (
    Answer,
    Head,
    answer_of,
    chat_logprobs,
    message_calls,
    passes,
    scored,
    text_logprobs,
    usage,
)
from difflm_jax.serving.asking import Asked
from difflm_jax.serving.deltas import Deltas
from difflm_jax.serving.requests import Draft, Event, Finished, Ticket, TokenProbability, Update
from difflm_jax.serving.schemas import ChatRequest
from difflm_jax.view.pieces import Pieces

DONE = "[DONE]"


class Chunks:
    """The chunks of one answer with all its choices, as dictionaries."""

    def __init__(self, asked: Asked, head: Head):
        self._asked, self._head = asked, head
        self._is_chat = isinstance(asked.body, ChatRequest)
        options = asked.body.stream_options
        self._counts = bool(options and options.include_usage)
        self._deltas = [Deltas(asked.lm.tokenizer, asked.ends if gap is None else ()) for gap in asked.gaps]
        self._scored = [0] * len(asked.requests)  # tokens whose log-probabilities were sent
        self._pieces = Pieces(asked.lm.tokenizer, asked.lm.mask_token_id)

    def begin(self) -> list[dict[str, Any]]:
        """Returns the chunks before the first token: the role, or the echoed prompt."""
        if self._is_chat:
            return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(len(self._deltas))]
        return [self._text(index, echo, None) for index, echo in enumerate(self._asked.echoes) if echo]

    def update(self, index: int, update: Update) -> list[dict[str, Any]]:
        """Returns the text that can be sent after `update`, then the canvas if drafts are requested."""
        gap = self._asked.gaps[index]
        tokens = update.tokens if gap is None else update.tokens[gap]
        said = self._deltas[index].feed(tokens.tolist())
        found = scored(self._asked, index, update)
        chunks = [self._content(index, said, found[: len(tokens)])] if said else []
        if update.draft is not None:
            chunk = self._content(index, "", ())
            chunks.append(chunk | {"diffusion": {"passes": update.passes, "draft": self._canvas(update.draft, gap)}})
        return chunks

    def finish(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        """Returns the rest of choice `index`, its tool calls, and its finish reason."""
        answer = answer_of(self._asked, index, finished)
        said = self._deltas[index].finish(answer.text.removeprefix(self._asked.echoes[index]))
        chunks, found = [], scored(self._asked, index, finished)
        if said or self._unsent(index, found):
            chunks.append(self._content(index, said, found))
        if answer.calls:
            calls = [{"index": place, **call} for place, call in enumerate(message_calls(answer.calls))]
            chunks.append(self._delta(index, {"tool_calls": calls}))
        return [*chunks, self._end(index, answer)]

    def end(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        """Returns the chunks after the last choice: the usage, if requested."""
        if not self._counts:
            return []
        return [self._chunk([]) | {"usage": usage(self._asked, finished)}]

    def _end(self, index: int, answer: Answer) -> dict[str, Any]:
        chunk = self._delta(index, {}) if self._is_chat else self._text(index, "", None)
        chunk["choices"][0]["finish_reason"] = answer.reason
        return chunk | {"diffusion": passes(self._asked, [answer.finished])}

    def _content(self, index: int, text: str, logprobs: Sequence[TokenProbability]) -> dict[str, Any]:
        new = self._unsent(index, logprobs) if self._asked.requests[index].logprobs is not None else []
        first = self._scored[index]
        self._scored[index] += len(new)
        if not self._is_chat:
            return self._text(index, text, text_logprobs(self._asked, logprobs, first) if new else None)
        chunk = self._delta(index, {"content": text} if text else {})
        if new:
            chunk["choices"][0]["logprobs"] = chat_logprobs(self._asked, new)
        return chunk

    def _unsent(self, index: int, logprobs: Sequence[TokenProbability]) -> Sequence[TokenProbability]:
        return logprobs[self._scored[index] :]

    def _canvas(self, draft: Draft, gap: slice | None) -> dict[str, Any]:
        """Returns text pieces and their states: committed (c), guessed (g) or open (o). An infilling shows its gap."""
        at = gap or slice(None)
        states = ["c" if c else "g" if g else "o" for c, g in zip(draft.committed[at], draft.guessed[at], strict=True)]
        tokens = draft.tokens[at].tolist()
        pieces = ["" if state == "o" else self._pieces(token) for token, state in zip(tokens, states, strict=True)]
        return {"pieces": pieces, "states": "".join(states)}

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return self._chunk([{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}])

    def _text(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return self._chunk([{"index": index, "text": text, "finish_reason": None, "logprobs": logprobs}])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._head.object("chat.completion.chunk" if self._is_chat else "text_completion", choices)
        return chunk | ({"usage": None} if self._counts else {})


async def events(
    asked: Asked,
    head: Head,
    tickets: Sequence[Ticket],
    failure: Callable[[Finished], dict[str, Any] | None],
    seen: Callable[[Event], None],
) -> AsyncIterator[str]:
    """Yields the data of each event as text. If the reader stops, the tickets are cancelled.

    `failure` returns the error of a failed request; `seen` is called with each event.
    """
    chunks, finished = Chunks(asked, head), [None] * len(tickets)
    try:
        for chunk in chunks.begin():
            yield _json(chunk)
        async for index, event in _merged(tickets):
            seen(event)
            if isinstance(event, Update):
                said = chunks.update(index, event)
            elif (error := failure(event)) is not None:
                yield _json(error)
                return
            else:
                finished[index] = event
                said = chunks.finish(index, event)
            for chunk in said:
                yield _json(chunk)
        for chunk in chunks.end(finished):
            yield _json(chunk)
        yield DONE
    finally:
        for ticket in tickets:
            ticket.cancel("the client has gone")


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Event]]:
    """Yields (choice, event) of all tickets as they arrive. A slow reader blocks nothing: tickets keep the newest."""
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(maxsize=1)

    async def read(index: int, ticket: Ticket) -> None:
        async for event in ticket:
            await queue.put((index, event))

    readers = [asyncio.create_task(read(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(tickets)
        while left:
            index, event = await queue.get()
            left -= isinstance(event, Finished)
            yield index, event
    finally:
        for reader in readers:
            reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*readers, return_exceptions=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
