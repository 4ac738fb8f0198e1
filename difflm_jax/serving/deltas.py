"""Deltas of a streamed answer: text that is final and that later tokens cannot change.

A client concatenates deltas, so sent text cannot be revoked. Text waits while it could be the start of a stop string or
tool call, or an incomplete character. It also waits while the tokenizer's decoder could still change it.
"""

import re
from collections.abc import Sequence
from typing import Any

# Texts that `clean_up_tokenization_spaces` of transformers replaces: each loses its first space.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Deltas:
    """The deltas of one answer. `ends`: texts that end the answer's content (stop strings, tool calls)."""

    def __init__(self, tokenizer: Any, ends: Sequence[str] = ()):
        self._tokenizer, self._ends, self._sent = tokenizer, tuple(ends), ""
        cleaned = _CLEANED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else ()
        self._waits = (*self._ends, *cleaned)

    def feed(self, tokens: Sequence[int]) -> str:
        """Returns the text that can be sent once the answer's first `tokens` are final; often empty."""
        return self._send(self._safe(self._text(self._complete(list(tokens)))))

    def finish(self, text: str) -> str:
        """Returns the rest, given the whole `text` of the answer."""
        return self._send(text)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        delta = text[len(self._sent) :]
        self._sent = text
        return delta

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _complete(self, tokens: list[int]) -> list[int]:
        """Drops byte tokens at the end of `tokens`, because the decoder converts a run of them as a whole."""
        pieces = self._tokenizer.convert_ids_to_tokens(tokens)
        end = len(pieces)
        while end and _BYTE.fullmatch(pieces[end - 1] or ""):
            end -= 1
        return tokens[:end]

    def _safe(self, text: str) -> str:
        text = text.rstrip(_INCOMPLETE)
        waiting = len(text) - max((_overlap(text, end) for end in self._waits), default=0)
        return text[: min([waiting, *(place for place in map(text.find, self._ends) if place >= 0)])]


def _overlap(text: str, end: str) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of `end`."""
    return next((size for size in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:size])), 0)
