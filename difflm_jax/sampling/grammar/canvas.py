"""Answers whose tokens are committed on a canvas of fixed length, under a grammar.

A finite automaton allows any order of commits. For each place it computes the states reachable from the left and those
from which the text can be completed on the right. Together they give the tokens that keep the canvas completable.
Places after an end of sequence are unconstrained. A parser knows only the left context, so it commits left to right.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.sampling.grammar.automaton import TokenAutomaton
from difflm_jax.sampling.grammar.bits import ALL, unpacked, words_of
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.grammar.vocabulary import Vocabulary

Noisy = Callable[[int], np.ndarray]  # a place -> noisy logits [V] float, whose argmax is the token drawn there


class CanvasRow(Protocol):
    """The constraint on one row's answer: N places from column `offset` of the canvas' blocks on."""

    offset: int
    most: int  # N

    def masks(self, tokens_N: np.ndarray, places: range) -> np.ndarray:
        """[len(places), W] uint32: tokens that may be committed at each of `places`, if it is the pass's only one."""

    def settled(self, tokens_N: np.ndarray, places: Sequence[int], chosen: Sequence[int], noisy: Noisy) -> dict:
        """Returns {place: token} to commit. `places` are in order of descending score, with their `chosen` tokens.

        A token that conflicts with those committed before it is replaced by the best allowed one.
        """


class AutomatonRow:
    """A `CanvasRow` over a finite automaton. It allows any order of commits."""

    def __init__(self, automaton: TokenAutomaton, most: int, offset: int, mask_token_id: int):
        if automaton.distance[0] > most:
            raise UserError(
                f"grammar: its shortest answer has {automaton.distance[0]} tokens, and max_new_tokens is {most}"
            )
        self.most, self.offset = most, offset
        self._automaton, self._mask = automaton, mask_token_id
        self._end = len(automaton.delta)  # the state after an end of sequence

    def masks(self, tokens_N: np.ndarray, places: range) -> np.ndarray:
        """See `CanvasRow`."""
        reached, completed = self._reach(tokens_N)
        return np.stack([self._bits(reached[place], completed[place + 1]) for place in places])

    def settled(self, tokens_N: np.ndarray, places: Sequence[int], chosen: Sequence[int], noisy: Noisy) -> dict:
        """See `CanvasRow`."""
        tokens_N, found = tokens_N.copy(), {}
        for place, token in zip(places, chosen, strict=True):
            if not found:  # drawn under the mask already
                tokens_N[place] = found[place] = int(token)
                continue
            reached, completed = self._reach(tokens_N)
            allowed = unpacked(self._bits(reached[place], completed[place + 1]), len(self._automaton.classes))
            tokens_N[place] = found[place] = int(token) if allowed[token] else best_of(noisy(place), allowed)
        return found

    def _reach(self, tokens_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns, both [N + 1, S + 1] bool: states reachable before each place, and states that can be completed."""
        reached = np.zeros((self.most + 1, self._end + 1), bool)
        completed = np.zeros_like(reached)
        reached[0, 0] = True
        completed[-1] = np.append(self._automaton.accepting, True)
        by_any, tokens = self._automaton.by_any_token, tokens_N.tolist()
        for place, token in enumerate(tokens):
            if token == self._mask:
                reached[place + 1] = reached[place].astype(np.float32) @ by_any > 0
            else:
                after = self._after(token)[reached[place]]
                reached[place + 1][after[after >= 0]] = True
        for place in range(self.most - 1, -1, -1):
            if tokens[place] == self._mask:
                completed[place] = by_any @ completed[place + 1].astype(np.float32) > 0
            else:
                after = self._after(tokens[place])
                completed[place] = (after >= 0) & completed[place + 1][after]
        return reached, completed

    def _after(self, token: int) -> np.ndarray:
        """[S + 1] the state that a committed token leads to from each state; -1: none."""
        automaton = self._automaton
        if token in automaton.eos_token_ids:
            return np.append(np.where(automaton.accepting, self._end, -1), self._end)
        return np.append(automaton.delta[:, automaton.classes[token]], self._end)

    def _bits(self, reached: np.ndarray, completed: np.ndarray) -> np.ndarray:
        if reached[self._end]:  # after an end of sequence, or after a mask that may become one
            return np.full(words_of(len(self._automaton.classes)), ALL)
        states = np.flatnonzero(reached[:-1])
        after = self._automaton.delta[states]
        classes = ((after >= 0) & completed[after]).any(axis=0)
        return self._automaton.bits(classes, bool(self._automaton.accepting[states].any()))


class MatcherRow:
    """A `CanvasRow` over a `Matcher`. It commits from left to right."""

    def __init__(self, matcher: Matcher, most: int, offset: int, vocabulary: Vocabulary):
        self.most, self.offset = most, offset
        self._matcher, self._vocabulary, self._eos_token_ids = matcher, vocabulary.size, vocabulary.eos_token_ids
        self._taken, self._has_ended = 0, False

    def masks(self, tokens_N: np.ndarray, places: range) -> np.ndarray:
        """See `CanvasRow`. Only the next place has a mask; it must be committed before the others."""
        found = np.full((len(places), words_of(self._vocabulary)), ALL)
        if self._taken in places and not self._has_ended:
            found[self._taken - places.start] = self._matcher.allowed(self.most - self._taken)
        return found

    def settled(self, tokens_N: np.ndarray, places: Sequence[int], chosen: Sequence[int], noisy: Noisy) -> dict:
        """See `CanvasRow`."""
        found: dict[int, int] = {}
        for place, token in sorted(zip(map(int, places), map(int, chosen), strict=True)):
            if place != self._taken or self._has_ended:
                break
            left = self.most - place
            if found and self._matcher.accepts([token]) != 1:
                token = best_of(noisy(place), unpacked(self._matcher.allowed(left), self._vocabulary))
            found[place] = self._matcher.take([token], left)[0]
            self._taken += 1
            self._has_ended = found[place] in self._eos_token_ids
        return found


def best_of(noisy_V: np.ndarray, allowed_V: np.ndarray) -> int:
    """Returns the allowed token of highest value."""
    return int(np.where(allowed_V, np.asarray(noisy_V), -np.inf).argmax())


def masks_of(rows: Sequence[CanvasRow], tokens_BL: np.ndarray, block: slice, first: int, vocabulary: int) -> np.ndarray:
    """[B, T, W] uint32: tokens allowed in the columns of `block`. `first` is the first column of the first block."""
    found = np.full((len(tokens_BL), block.stop - block.start, words_of(vocabulary)), ALL)
    for number, row in enumerate(rows):
        start = first + row.offset
        places = range(max(block.start - start, 0), min(block.stop - start, row.most))
        if len(places):
            at = slice(start + places.start - block.start, start + places.stop - block.start)
            found[number, at] = row.masks(tokens_BL[number, start : start + row.most], places)
    return found
