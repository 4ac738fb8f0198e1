"""From finished requests to OpenAI's objects: texts, tool calls, log-probabilities, usage, reasons, and the passes."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from difflm_jax.sampling.text import cut_answer, stop_strings
from difflm_jax.serving.asking import Asked
from difflm_jax.serving.requests import Event, Finished, TokenProbability
from difflm_jax.serving.schemas import ChatRequest
from difflm_jax.serving.tools import Call, parse_calls
from difflm_jax.view.pieces import Pieces


@dataclasses.dataclass(frozen=True)
class Head:
    """The fields that all objects of one answer share."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def of(cls, asked: Asked, fingerprint: str) -> "Head":
        prefix = "chatcmpl" if isinstance(asked.body, ChatRequest) else "cmpl"
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), asked.requests[0].model, fingerprint)

    def object(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns an object of `kind` with `choices`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            "system_fingerprint": self.fingerprint,
        }


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished choice in the form that the client sees."""

    text: str  # for a chat: the content, without calls
    calls: list[Call]
    reason: str
    finished: Finished


def answer_of(asked: Asked, index: int, finished: Finished) -> Answer:
    """Returns choice `index` as text and tool calls."""
    tokens, gap, lm = finished.tokens, asked.gaps[index], asked.lm
    if gap is not None:
        text = decoded(asked, tokens[gap])
        return Answer(asked.echoes[index] + text, [], finished.finish_reason, finished)
    stops, stop_ids = stop_strings(asked.requests[index].stop, lm.tokenizer)
    text, _ = cut_answer(tokens, (*lm.eos_token_ids, *stop_ids), stops, lambda part: decoded(asked, part))
    calls: list[Call] = []
    if asked.finds_calls:
        text, calls = parse_calls(text)
        calls = calls[:1] if asked.body.parallel_tool_calls is False else calls
    reason = "tool_calls" if calls else finished.finish_reason
    return Answer(asked.echoes[index] + text, calls, reason, finished)


def whole(asked: Asked, head: Head, finished: Sequence[Finished]) -> dict[str, Any]:
    """Returns the response object of a request that is not streamed."""
    answers = [answer_of(asked, index, one) for index, one in enumerate(finished)]
    if isinstance(asked.body, ChatRequest):
        choices = [_chat_choice(asked, index, answer) for index, answer in enumerate(answers)]
        said = head.object("chat.completion", choices)
        if asked.body.metadata is not None:
            said["metadata"] = asked.body.metadata
    else:
        choices = [_text_choice(asked, index, answer) for index, answer in enumerate(answers)]
        said = head.object("text_completion", choices)
    return said | {"usage": usage(asked, finished), "diffusion": passes(asked, finished)}


def usage(asked: Asked, finished: Sequence[Finished]) -> dict[str, Any]:
    """Returns the token counts: each prompt once, and all answers up to their ends."""
    n = asked.body.n or 1
    lengths = [
        len(request.tokens) - (gap.stop - gap.start if gap else 0)
        for request, gap in zip(asked.requests, asked.gaps, strict=True)
    ]
    prompt, answers = sum(lengths[::n]), sum(one.completion_tokens for one in finished)
    cached = sum(one.cached_tokens for one in finished[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def passes(asked: Asked, finished: Sequence[Finished]) -> dict[str, Any]:
    """Returns how the answers were decoded. `passes` is a sum over choices; `acceptance` is null without drafts."""
    count = sum(one.passes for one in finished)
    accepted = [one.acceptance for one in finished if one.acceptance is not None]
    return {
        "passes": count,
        "tokens_per_pass": round(sum(one.completion_tokens for one in finished) / max(count, 1), 4),
        "algorithm": finished[0].algorithm,
        "acceptance": round(sum(accepted) / len(accepted), 4) if accepted else None,
        "seed": asked.requests[0].seed,
    }


def message_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Returns tool calls in OpenAI's form, with new ids."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def _chat_choice(asked: Asked, index: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.calls:
        message |= {"content": answer.text or None, "tool_calls": message_calls(answer.calls)}
    said = None
    if asked.requests[index].logprobs is not None:
        said = chat_logprobs(asked, scored(asked, index, answer.finished))
    return {"index": index, "message": message, "finish_reason": answer.reason, "logprobs": said}


def _text_choice(asked: Asked, index: int, answer: Answer) -> dict[str, Any]:
    said = None
    if asked.requests[index].logprobs is not None:
        said = text_logprobs(asked, scored(asked, index, answer.finished))
    return {"index": index, "text": answer.text, "finish_reason": answer.reason, "logprobs": said}


def scored(asked: Asked, index: int, event: Event) -> Sequence[TokenProbability]:
    """Returns the probabilities of the tokens that choice `index` shows; for an infilled canvas, those of its gap."""
    gap = asked.gaps[index]
    return event.logprobs if gap is None else event.logprobs[gap]


def chat_logprobs(asked: Asked, found: Sequence[TokenProbability]) -> dict[str, Any]:
    """Returns the log-probability of each token when it was committed, without EOS tokens."""
    pieces = Pieces(asked.lm.tokenizer, asked.lm.mask_token_id)

    def said(token: int, logprob: float) -> dict[str, Any]:
        piece = pieces(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in piece
        return {"token": piece, "logprob": _finite(logprob), "bytes": list(piece.encode()) if whole else None}

    content = [
        said(one.token, one.logprob) | {"top_logprobs": [said(*candidate) for candidate in one.candidates]}
        for one in found
        if one.token not in asked.lm.eos_token_ids
    ]
    return {"content": content, "refusal": None}


def text_logprobs(asked: Asked, found: Sequence[TokenProbability], first: int = 0) -> dict[str, Any]:
    """Returns the same in the older form, for the tokens from `first` on; `found` begins with the answer."""
    pieces = Pieces(asked.lm.tokenizer, asked.lm.mask_token_id)
    before, new = (
        [one for one in part if one.token not in asked.lm.eos_token_ids] for part in (found[:first], found[first:])
    )
    tokens = np.array([one.token for one in (*before, *new)], np.int32)
    texts = [decoded(asked, tokens[:place]) for place in range(len(before), len(tokens))]
    return {
        "tokens": [pieces(one.token) for one in new],
        "token_logprobs": [_finite(one.logprob) for one in new],
        "top_logprobs": [{pieces(token): _finite(value) for token, value in one.candidates} for one in new],
        "text_offset": [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts],
    }


def decoded(asked: Asked, tokens: np.ndarray) -> str:
    return asked.lm.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def _finite(logprob: float) -> float:
    """Replaces -inf, which JSON lacks, by -9999 as OpenAI's API does."""
    return max(float(logprob), -9999.0)
