"""Finite automata over tokens, with the distance of each state to the end, and their matcher.

Tokens with equal transitions from every state form one class. Tables are indexed by class, of which there are few.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.sampling.grammar.bits import packed
from difflm_jax.sampling.grammar.regex import ByteAutomaton
from difflm_jax.sampling.grammar.vocabulary import Vocabulary

FAR = np.int32(1 << 30)
MOST_MOVES = 40_000_000  # (state, token) pairs; 320 MB while they are grouped into classes


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """An automaton of S states and C token classes. State 0 is the start; class 0 has no transitions."""

    delta: np.ndarray  # [S, C] int32, the next state; -1: not allowed
    classes: np.ndarray  # [V] int32
    accepting: np.ndarray  # [S] bool
    distance: np.ndarray  # [S] int32, tokens to the nearest accepting state, not counting an end of sequence
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, automaton: ByteAutomaton, vocabulary: Vocabulary) -> "TokenAutomaton":
        """Builds the automaton over the tokens of `vocabulary`. Raises `UserError` if they can write no such text."""
        delta, classes = _token_moves(automaton.delta, vocabulary)
        distance = np.where(automaton.accepting, 0, FAR).astype(np.int32)
        while True:
            after = np.where(delta >= 0, distance[delta], FAR).min(axis=1)
            nearer = np.minimum(distance, np.minimum(after, FAR - 1) + 1)
            if (nearer == distance).all():
                break
            distance = nearer
        if distance[0] >= FAR:
            raise UserError("grammar: this tokenizer cannot write any of its texts")
        return cls(delta, classes, automaton.accepting, distance, vocabulary.eos_token_ids)

    @functools.cached_property
    def by_any_token(self) -> np.ndarray:
        """[S + 1, S + 1] float32: 1 where some token leads from one state to another. State S follows an EOS."""
        end = len(self.delta)
        moves = np.zeros((end + 1, end + 1), np.float32)
        states, classes = np.nonzero(self.delta >= 0)
        moves[states, self.delta[states, classes]] = 1
        moves[:-1, end] = self.accepting
        moves[end, end] = 1
        return moves

    @functools.cached_property
    def farthest(self) -> int:
        """The largest finite distance of any state."""
        return int(self.distance[self.distance < FAR].max())

    def allowed(self, state: int, most: int) -> np.ndarray:
        """[ceil(V / 32)] uint32: tokens after which the text can be completed in `most` more; EOS if it is complete."""
        return self._allowed(state, min(most, self.farthest))

    @functools.lru_cache(maxsize=512)  # noqa: B019 - lives as long as the automaton, which is cached with its grammar
    def _allowed(self, state: int, most: int) -> np.ndarray:
        row = self.delta[state]
        return self.bits((row >= 0) & (self.distance[row] <= most), bool(self.accepting[state]))

    def bits(self, classes: np.ndarray, ends: bool) -> np.ndarray:
        """[ceil(V / 32)] uint32: the tokens of `classes` ([C] bool), and with `ends` the EOS tokens."""
        tokens = classes[self.classes]
        if ends:
            tokens[list(self.eos_token_ids)] = True
        return packed(tokens)


class AutomatonMatcher:
    """A `Matcher` whose masks leave out tokens that could not be completed within the budget."""

    def __init__(self, automaton: TokenAutomaton, state: int = 0, has_ended: bool = False):
        self.automaton, self._state, self._has_ended = automaton, state, has_ended

    def allowed(self, remaining: int) -> np.ndarray:
        """See `Matcher`. A budget in which the text cannot be completed at all is ignored."""
        automaton = self.automaton
        if self._has_ended:
            return automaton.bits(np.zeros(automaton.delta.shape[1], bool), True)
        fits = automaton.distance[self._state] <= remaining
        return automaton.allowed(self._state, remaining - 1 if fits else automaton.farthest)

    def take(self, tokens: Sequence[int], remaining: int) -> list[int]:
        """See `Matcher`. Keeps all tokens up to an end of sequence."""
        kept = []
        for token in map(int, tokens):
            if self._has_ended:
                break
            self.advance([token])
            kept.append(token)
        return kept

    def accepts(self, tokens: Sequence[int]) -> int:
        """See `Matcher`."""
        state, ended = self._state, self._has_ended
        for count, token in enumerate(map(int, tokens)):
            if ended:
                return count
            if token in self.automaton.eos_token_ids:
                ended = bool(self.automaton.accepting[state])
                if not ended:
                    return count
                continue
            after = self.automaton.delta[state, self.automaton.classes[token]]
            if after < 0 or self.automaton.distance[after] >= FAR:
                return count
            state = int(after)
        return len(tokens)

    def advance(self, tokens: Sequence[int]) -> None:
        """See `Matcher`."""
        for token in map(int, tokens):
            if self.accepts([token]) != 1:
                raise ValueError(f"token {token} may not come next")
            if token in self.automaton.eos_token_ids:
                self._has_ended = True
            else:
                self._state = int(self.automaton.delta[self._state, self.automaton.classes[token]])

    @property
    def is_accepting(self) -> bool:
        """See `Matcher`."""
        return self._has_ended or bool(self.automaton.accepting[self._state])

    @property
    def is_finished(self) -> bool:
        """See `Matcher`."""
        return self._has_ended or (self.is_accepting and not (self.automaton.delta[self._state] >= 0).any())

    def copy(self) -> "AutomatonMatcher":
        """See `Matcher`."""
        return AutomatonMatcher(self.automaton, self._state, self._has_ended)


def _token_moves(delta: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the state after a token of each class [S, C], the class of each token [V]), int32."""
    ids = np.array([token for token, text in enumerate(vocabulary.texts) if text], np.int64)
    ids = ids[~np.isin(ids, vocabulary.eos_token_ids)]
    texts = [vocabulary.texts[token] for token in ids]
    lengths = np.array([len(text) for text in texts])
    padded = np.zeros((len(texts), max(lengths, default=1)), np.uint8)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = np.frombuffer(text, np.uint8)
    classes, known, total = np.zeros(vocabulary.size, np.int64), 1, 0
    moves: list[tuple[np.ndarray, np.ndarray]] = []
    for state in range(len(delta)):
        rows, states = np.arange(len(ids)), np.full(len(ids), state)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for place in range(padded.shape[1]):
            states = delta[states, padded[rows, place]]
            alive = states >= 0
            rows, states = rows[alive], states[alive]
            ends = lengths[rows] == place + 1
            found.append((rows[ends], states[ends]))
            rows, states = rows[~ends], states[~ends]
            if not len(rows):
                break
        tokens = ids[np.concatenate([rows for rows, _ in found])].astype(np.int32)
        targets = np.concatenate([states for _, states in found]).astype(np.int32)
        moves.append((tokens, targets))
        total += len(tokens)
        if total > MOST_MOVES:
            raise UserError("grammar: too many moves of too many tokens; make it simpler")
        # Tokens stay in one class if their transitions so far, and from this state, are equal.
        pairs = classes[tokens] * (len(delta) + 1) + targets
        unique, inverse = np.unique(pairs, return_inverse=True)
        classes[tokens] = known + inverse
        known += len(unique)
    used, classes = np.unique(np.concatenate([[0], classes]), return_inverse=True)
    classes = classes[1:]
    table = np.full((len(delta), len(used)), -1, np.int32)
    for state, (tokens, targets) in enumerate(moves):
        table[state, classes[tokens]] = targets
    return table, classes.astype(np.int32)
