"""What goes into generation and what comes out of it: prompts as a list, answers cut where they end."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from difflm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
    """Row by row: the text, the tokens (1-D int arrays), the forward passes used, and the masks that they filled."""

    texts: list[str]
    tokens: list[np.ndarray]
    steps: np.ndarray
    committed: np.ndarray
    verified: np.ndarray | None = None  # [rows] passes that verified drafts
    accepted: np.ndarray | None = None  # [rows, depths] how many of them accepted at least 1, 2, ... drafts

    @property
    def accepted_by_depth(self) -> np.ndarray:
        """[depths] share of the passes with drafts that accepted at least 1, 2, ... of them; of all rows together."""
        if self.accepted is None:
            raise AttributeError("accepted_by_depth belongs to speculative decoding")
        return self.accepted.sum(axis=0) / max(self.verified.sum(), 1)

    @property
    def tokens_per_pass(self) -> np.ndarray:
        """[rows] masks filled in a forward pass, on average; 0 where there was none to fill."""
        return self.committed / np.maximum(self.steps, 1)


def as_list(prompts: Any) -> list[Any]:
    """One prompt or many -> a list of prompts: a string, a message list (with tools in a mapping) and a token list are
    each one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = list(prompts)
    first = prompts[0] if prompts else None
    is_message = isinstance(first, Mapping) and "messages" not in first
    return [prompts] if is_message or isinstance(first, int) or getattr(first, "ndim", 1) == 0 else prompts


def stop_strings(stop: str | Sequence[str], tokenizer: Any) -> tuple[list[str], list[int]]:
    """One stop string or many -> (a list of them, the tokens of those that are special tokens).

    Special tokens are not found in decoded text, which lacks them. Raises `UserError` for anything else, and for an
    empty string.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if any(not isinstance(text, str) or not text for text in stops):
        raise UserError(f"stop={stop!r}: must be a string, or a list of strings, none of them empty")
    added = tokenizer.added_tokens_decoder.items()
    return stops, [index for index, token in added if token.special and token.content in stops]


def cut_answer(
    tokens: np.ndarray, end_token_ids: Sequence[int], stops: Sequence[str], decode: Callable[[np.ndarray], str]
) -> tuple[str, np.ndarray]:
    """(text, tokens) of an answer: tokens up to and including its first end token, or the token that completes a stop
    string; text up to either."""
    ends = np.flatnonzero(np.isin(tokens, end_token_ids))
    tokens = tokens[: ends[0] + 1] if len(ends) else tokens
    text = decode(tokens)
    found = [text.find(stop) for stop in stops if stop in text]
    if not found:
        return text, tokens
    counts = range(1, len(tokens) + 1)
    complete = next(count for count in counts if any(stop in decode(tokens[:count]) for stop in stops))
    return text[: min(found)], tokens[:complete]
