"""Between text and tokens: turns prompts, chats and canvases into rows, and rows into answers cut at their end."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.data.chat import encode_chat, encode_prompt
from difflm_jax.errors import UserError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int] | Mapping[str, Any]  # the last: {"messages": ..., "tools": ...}
_PROMPT_KEYS = ("messages", "tools", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenises and checks prompts, answers and canvases, int32 [L]. Raises `UserError` for invalid input."""

    tokenizer: Any
    vocab_size: int
    mask_token_id: int

    def prompt(self, prompt: Prompt) -> np.ndarray:
        """Tokenises a string, messages (with tools), or tokens; no mask token is allowed.

        With a chat template, a string is a user's turn.
        """
        if isinstance(prompt, str):
            _check_text(prompt)
        if isinstance(prompt, str) and self.tokenizer.chat_template is None:
            tokens = np.asarray(_begun(self.tokenizer, prompt), np.int32)
        elif _is_tokens(prompt):
            tokens = _tokens(prompt)
        else:
            tokens = encode_prompt(self.tokenizer, *_conversation(prompt))
        if tokens.ndim != 1 or tokens.size == 0:
            raise UserError("generate: a prompt must hold at least one token")
        return self._checked(tokens, "generate: the prompt", masks_allowed=False)

    def all(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Applies `prompt` to each. If there are several, an error names the one, counted from 1."""
        return self._each(self.prompt, prompts)

    def canvases(self, canvases: Sequence[str | Sequence[int]]) -> list[np.ndarray]:
        """Applies `canvas` to each, with errors as in `all`."""
        return self._each(self.canvas, canvases)

    def _each(self, read: Callable[[Any], np.ndarray], given: Sequence[Any]) -> list[np.ndarray]:
        rows = []
        for number, one in enumerate(given, start=1):
            try:
                rows.append(read(one))
            except UserError as error:
                if len(given) == 1:
                    raise
                raise UserError(f"{error} (prompt {number} of {len(given)})") from error
        return rows

    def scored(self, prompt: Prompt, answer: str | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of (prompt, answer). An answer given as text ends its turn as in training.

        Token sequences may be empty.
        """
        if not isinstance(answer, str):
            parts = _tokens(prompt) if _is_tokens(prompt) else self.prompt(prompt), _tokens(answer)
        elif isinstance(prompt, str) and self.tokenizer.chat_template is None:
            answered = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            parts = self.prompt(prompt), np.asarray(answered, np.int32)
        else:
            messages, tools, arguments = _conversation(prompt)
            whole = [*messages, {"role": "assistant", "content": answer}]
            encoded = encode_chat(self.tokenizer, whole, tools=tools, template_arguments=arguments)
            parts = encoded.tokens[: encoded.prompt_length], encoded.tokens[encoded.prompt_length :]
        given, answer = (self._checked(part, "log_likelihood: a row", masks_allowed=False) for part in parts)
        return given, answer

    def canvas(self, canvas: str | Sequence[int]) -> np.ndarray:
        """Tokenises text that contains the mask token, or checks tokens. The masks are to be filled."""
        if isinstance(canvas, str):
            _check_text(canvas)
        tokens = _begun(self.tokenizer, canvas) if isinstance(canvas, str) else canvas
        return self._checked(_tokens(tokens), "infill: the canvas", masks_allowed=True)

    def batch(self, tokens_BL: Any) -> jax.Array:
        """Returns rows of equal length as int32 [B, L]; masks are allowed. Traced values are not checked."""
        if isinstance(tokens_BL, jax.core.Tracer):
            found_BL = tokens_BL
        else:
            found_BL = self._checked(_tokens(tokens_BL), "the batch", masks_allowed=True)
        if found_BL.ndim != 2:
            raise UserError(f"tokens: expected [batch, length], got shape {found_BL.shape}")
        return jnp.asarray(found_BL, jnp.int32)

    def _checked(self, tokens: np.ndarray, what: str, masks_allowed: bool) -> np.ndarray:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UserError(f"{what} holds a token outside 0..{self.vocab_size - 1}")
        if not masks_allowed and (tokens == self.mask_token_id).any():
            raise UserError(f"{what} holds the mask token {self.tokenizer.mask_token!r}: use infill")
        return tokens


def _begun(tokenizer: Any, text: str) -> list[int]:
    """Tokenises a text to be continued: keeps special tokens that the tokenizer adds before it, drops those after."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    after = next((n for n in range(len(whole)) if whole[len(whole) - n - len(bare) : len(whole) - n] == bare), 0)
    tokens = tokenizer(text)["input_ids"]
    return tokens[: len(tokens) - after]


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not text in UTF-8 ({error.reason} at character {error.start})") from error


def _tokens(tokens: Sequence[int]) -> np.ndarray:
    found = np.asarray(tokens)
    if found.size and found.dtype.kind not in "iu":
        raise UserError(f"tokens must be integers, not {found.dtype.name}")
    return np.clip(found, -1, np.iinfo(np.int32).max).astype(np.int32)  # clipped values still fail the range check


def _is_tokens(prompt: Prompt) -> bool:
    if isinstance(prompt, (str, Mapping)):
        return False
    if not hasattr(prompt, "__len__"):
        raise UserError(f"a prompt is a text, messages or tokens, not {type(prompt).__name__}")
    return not len(prompt) or not isinstance(prompt[0], Mapping)


def _conversation(prompt: Prompt) -> tuple[Sequence[Message], Any, Any]:
    """Splits a prompt into (messages, tools, arguments of the chat template).

    The prompt is a string, messages, or a mapping with all three.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], None, None
    if isinstance(prompt, Mapping):
        if set(prompt) - set(_PROMPT_KEYS) or "messages" not in prompt:
            known = ", ".join(f"{key!r}: ..." for key in _PROMPT_KEYS)
            raise UserError(f"a prompt with keys is {{{known}}}, not {sorted(map(str, prompt))}")
        return tuple(prompt.get(key) for key in _PROMPT_KEYS)
    return prompt, None, None


@dataclasses.dataclass(frozen=True)
class Generation:
    """For each row: its text, tokens (a 1-D int array), forward passes used, and the masks that they filled."""

    texts: list[str]
    tokens: list[np.ndarray]
    steps: np.ndarray
    committed: np.ndarray
    verified: np.ndarray | None = None  # [rows] passes that verified drafts
    accepted: np.ndarray | None = None  # [rows, depths] passes that accepted at least 1, 2, ... drafts
    complete: np.ndarray | None = None  # [rows] bool, with a grammar: whether the text is complete under it

    @property
    def accepted_by_depth(self) -> np.ndarray:
        """[depths] share of the passes with drafts that accepted at least 1, 2, ... of them, over all rows."""
        if self.accepted is None:
            raise AttributeError("accepted_by_depth belongs to speculative decoding")
        return self.accepted.sum(axis=0) / max(self.verified.sum(), 1)

    @property
    def tokens_per_pass(self) -> np.ndarray:
        """[rows] mean number of masks filled per forward pass; 0 if there was none to fill."""
        return self.committed / np.maximum(self.steps, 1)


def as_list(prompts: Any) -> list[Any]:
    """Returns one prompt or many as a list of prompts.

    A string, a message list, a mapping of messages and tools, and a token list are one prompt each.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = list(prompts)
    first = prompts[0] if prompts else None
    is_message = isinstance(first, Mapping) and "messages" not in first
    return [prompts] if is_message or isinstance(first, int) or getattr(first, "ndim", 1) == 0 else prompts


def stop_strings(stop: str | Sequence[str], tokenizer: Any) -> tuple[list[str], list[int]]:
    """Returns one stop string or many as (a list, the ids of those that are special tokens).

    Special tokens need their ids, because decoded text lacks them. Raises `UserError` for an empty string or another
    type.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if any(not isinstance(text, str) or not text for text in stops):
        raise UserError(f"stop={stop!r}: must be a string, or a list of strings, none of them empty")
    added = tokenizer.added_tokens_decoder.items()
    return stops, [index for index, token in added if token.special and token.content in stops]


def cut_answer(
    tokens: np.ndarray, end_token_ids: Sequence[int], stops: Sequence[str], decode: Callable[[np.ndarray], str]
) -> tuple[str, np.ndarray]:
    """Cuts an answer at its first end token or stop string. Returns (text, tokens).

    The tokens include the end token, or the token that completes the stop string. The text includes neither.
    """
    ends = np.flatnonzero(np.isin(tokens, end_token_ids))
    tokens = tokens[: ends[0] + 1] if len(ends) else tokens
    text = decode(tokens)
    found = [text.find(stop) for stop in stops if stop in text]
    if not found:
        return text, tokens
    counts = range(1, len(tokens) + 1)
    complete = next(count for count in counts if any(stop in decode(tokens[:count]) for stop in stops))
    return text[: min(found)], tokens[:complete]


def is_stopped(
    tokens: np.ndarray, stop_ids: Sequence[int], stops: Sequence[str], decode: Callable[[np.ndarray], str]
) -> bool:
    """Whether `tokens` contain a complete stop string."""
    text = decode(tokens)
    return bool(np.isin(tokens, stop_ids).any()) or any(stop in text for stop in stops)
