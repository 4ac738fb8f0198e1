"""Tokenises requests: conversations with the chat template, texts, and canvases with a gap.

The template is the model's own and runs in the sandbox of transformers, under a time limit. A request can only set
plain values for the arguments that the template reads.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from difflm_jax.data.messages import Conversation, parse_messages
from difflm_jax.data.template_forms import template_arguments
from difflm_jax.data.templates import render_prompt
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.serving.schemas import BadRequestError, Message, Tool
from difflm_jax.utils.flag_help import nearest


class _TooSlowError(Exception):
    pass


def chat_text(
    lm: LanguageModel,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    arguments: Mapping[str, Any] | None,
    seconds: float,
) -> str:
    """Renders a conversation up to its next answer with the chat template. Raises `BadRequestError`."""
    if lm.tokenizer.chat_template is None:
        raise BadRequestError("messages: this model has no chat template; use /v1/completions", "messages")
    said = [_plain(message) for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    _check_arguments(lm, described, arguments or {})
    try:
        parsed = parse_messages(said, described)
        conversation = Conversation(parsed.messages, parsed.tools, template_arguments=dict(arguments or {}))
        with _time_limit(seconds):
            text = render_prompt(lm.tokenizer, conversation)
    except _TooSlowError:
        raise BadRequestError(f"messages: the chat template took longer than {seconds:g} s", "messages") from None
    except UserError as error:
        raise BadRequestError(f"messages: {error}", "messages") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the JSON of a tool call may contain half of a surrogate pair
        raise BadRequestError(f"messages: not text in UTF-8 ({error.reason})", "messages") from error
    for i, message in enumerate(messages):
        if message.name is not None and message.name not in text:
            raise BadRequestError(f"messages.{i}.name: the chat template does not show it", f"messages.{i}.name")
    return text


def chat_tokens(lm: LanguageModel, text: str) -> np.ndarray:
    """[L] int32 tokens of a conversation that `chat_text` rendered. Raises `BadRequestError`."""
    tokens = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _without_masks(lm, np.asarray(tokens, np.int32), "messages")


def prompt_tokens(lm: LanguageModel, prompt: str | Sequence[int], may_be_empty: bool = False) -> np.ndarray:
    """[L] int32 tokens of a text to be continued, or of a list of tokens. Raises `BadRequestError`."""
    try:
        tokens = lm.prompts.canvas(prompt)
    except UserError as error:
        raise BadRequestError(f"prompt: {error}", "prompt") from error
    if not len(tokens) and not may_be_empty:
        raise BadRequestError("prompt: must hold at least one token", "prompt")
    return _without_masks(lm, tokens, "prompt")


def canvas_tokens(lm: LanguageModel, prompt: str | Sequence[int], gap: int, suffix: str) -> tuple[np.ndarray, int]:
    """Returns ([L] int32 tokens of prompt, `gap` masks and suffix; start of the gap). Raises `BadRequestError`."""
    before = prompt_tokens(lm, prompt, may_be_empty=True)
    found = lm.tokenizer(suffix, add_special_tokens=False, verbose=False)["input_ids"]
    after = _without_masks(lm, np.asarray(found, np.int32), "suffix")
    masks = np.full(gap, lm.mask_token_id, np.int32)
    return np.concatenate([before, masks, after]).astype(np.int32), len(before)


def _plain(message: Message) -> dict[str, Any]:
    """Converts a message to the form that `parse_messages` takes."""
    said = message.model_dump(exclude_none=True)
    if message.role == "developer":
        said["role"] = "system"
    if isinstance(message.content, list):
        said["content"] = "".join(part.text for part in message.content)
    return said


def _check_arguments(lm: LanguageModel, tools: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> None:
    """Raises `BadRequestError` for an argument that the template does not read."""
    if not arguments:
        return
    known = template_arguments(lm.tokenizer.get_chat_template(tools=tools or None))
    for name in arguments:
        if name not in known:
            meant = f"did you mean {nearest(name, known)}?" if known else "it takes none"
            where = f"chat_template_kwargs.{name}"
            raise BadRequestError(f"{where}: the chat template has no such argument ({meant})", where)


def _without_masks(lm: LanguageModel, tokens: np.ndarray, what: str) -> np.ndarray:
    if (tokens == lm.mask_token_id).any():
        raise BadRequestError(
            f"{what}: holds the mask token {lm.tokenizer.mask_token!r}; to fill a gap, use prompt and suffix", what
        )
    return tokens


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises `_TooSlowError` in Python code of this thread after `seconds`. No API stops a thread from outside."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def trace(*_: Any) -> Any:
        if time.monotonic() > end:
            raise _TooSlowError
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
