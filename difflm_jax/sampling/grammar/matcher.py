"""What decoding asks of a grammar: where a row stands in it, and what may come next."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Matcher(Protocol):
    """A place in a grammar, for one row. An end-of-sequence token may come where the text is complete, and ends it."""

    def allowed(self, remaining: int) -> np.ndarray:
        """[ceil(V / 32)] uint32, bit v % 32 of word v // 32: whether token v may come next.

        `remaining` tokens, the next one included, are left of the row's budget: a grammar that can tell leaves out what
        could not be completed in them.
        """

    def take(self, tokens: Sequence[int], remaining: int) -> list[int]:
        """Moves on by `tokens` that a model chose under `allowed`, and returns those that the row keeps.

        They are `tokens` themselves, unless one of them could not be completed within the budget: then those before it,
        and a token in its place that can.
        """

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` may come next, one after another. Does not move."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Moves on by `tokens`. Raises `ValueError` for one that may not come next."""

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far is complete."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but an end of sequence may follow, or it has ended."""

    def copy(self) -> "Matcher":
        """The same place, which moves by itself."""
