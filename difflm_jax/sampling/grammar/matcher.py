"""The interface between decoding and a grammar: the position of a row in it, and the tokens that may come next."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Matcher(Protocol):
    """The position of one row in a grammar. An end-of-sequence token is allowed once the text is complete."""

    def allowed(self, remaining: int) -> np.ndarray:
        """[ceil(V / 32)] uint32; bit v % 32 of word v // 32: whether token v may come next.

        `remaining` is the row's remaining budget of tokens, including the next one. A grammar that knows its distance
        to the end leaves out tokens that could not be completed within it.
        """

    def take(self, tokens: Sequence[int], remaining: int) -> list[int]:
        """Advances by `tokens` that a model chose under `allowed`, and returns those that the row keeps.

        If a token could not be completed within the budget, the row keeps those before it and a replacement that can.
        """

    def accepts(self, tokens: Sequence[int]) -> int:
        """Counts how many of `tokens` may come next, one after another. Does not advance."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Advances by `tokens`. Raises `ValueError` for one that may not come next."""

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far is complete."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but an end of sequence may follow, or it has ended."""

    def copy(self) -> "Matcher":
        """Returns an independent matcher at the same position."""
