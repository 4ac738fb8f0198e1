"""Tokens as pieces of text that are safe to display, and their colours."""

import functools
import unicodedata
from typing import Any

_MASK = "░"


class Pieces:
    """The text of each token on its own, as in the middle of a text."""

    def __init__(self, tokenizer: Any, mask_token_id: int):
        self._tokenizer, self._mask_token_id = tokenizer, mask_token_id
        # Some tokenizers drop the space at the beginning of a text, so decode every token after another one.
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor = anchor[-1:]
        self._anchor_text = tokenizer.decode(self._anchor)

    @functools.cache  # noqa: B019  one object per command
    def __call__(self, token: int) -> str:
        """Returns the text of a token, unescaped. A part of a character is U+FFFD."""
        if token == self._mask_token_id:
            return _MASK
        return self._tokenizer.decode([*self._anchor, int(token)]).removeprefix(self._anchor_text)


def printable(text: str) -> str:
    """Returns `text` on one line, with ↵ for newlines. Unprintable characters are escaped: none controls a terminal."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else ascii(c)[1:-1] for c in text)


def width(text: str) -> int:
    """Returns the number of terminal columns that `text` takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def ansi(text: str, *codes: str) -> str:
    """Returns `text` between ANSI escapes (select graphic rendition) with `codes`."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text


def confidence_code(confidence: float) -> str:
    """Returns the code of a foreground colour (256-colour palette): from red (0) through yellow to green (1)."""
    steps = (196, 202, 208, 214, 220, 226, 190, 154, 118, 82, 46)
    return f"38;5;{steps[min(int(confidence * len(steps)), len(steps) - 1)]}"
