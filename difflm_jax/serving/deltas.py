"""The part of an answer that can be sent: final from the left, and safe for what may still follow.

A client joins deltas, and nothing that was sent can be taken back. So text waits while it could be the beginning of a
stop string, of a tool call, or of a character whose bytes are not complete, and while the tokenizer's decoder could
still change it.
"""

import re
from collections.abc import Sequence
from typing import Any

# What `clean_up_tokenization_spaces` of transformers replaces; each begins with a space that then disappears.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Deltas:
    """The deltas of one answer. `ends`: texts before which the answer's content ends (stop strings, tool calls)."""

    def __init__(self, tokenizer: Any, ends: Sequence[str] = ()):
        self._tokenizer, self._ends, self._sent = tokenizer, tuple(ends), ""
        cleaned = _CLEANED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else ()
        self._waits = (*self._ends, *cleaned)

    def feed(self, tokens: Sequence[int]) -> str:
        """What can be sent after the answer's first `tokens` are final; often nothing."""
        return self._send(self._safe(self._text(self._complete(list(tokens)))))

    def finish(self, text: str) -> str:
        """The rest, once the whole `text` of the answer is known."""
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
        """`tokens` without the bytes at their end: a decoder of single bytes reads a run of them as a whole."""
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
    """How many characters at the end of `text` begin `end`."""
    return next((size for size in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:size])), 0)
