"""Matchers of context-free grammars (JSON schemas and Lark), over llguidance's parser.

The parser knows which tokens may come next, but not the distance to the end. To end an answer within its budget, a
matcher keeps an ending: tokens that complete the text, found by a search that tries closing tokens first. If no ending
fits the budget after a token, it is replaced by the first token of the ending. Endings need not be the shortest. Near
its budget an answer may be closed a few tokens early, but never stays open once an ending was found.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from difflm_jax.errors import UserError, one_line
from difflm_jax.sampling.grammar.vocabulary import Vocabulary

# Bytes in the order in which a search tries them: closing, separating, short values, opening.
_CLOSING = b'}])",:0123456789;tfnaeiourlsE-.+{[( '


def _ranks(order: bytes) -> np.ndarray:
    """[256] int: the rank of each byte in `order`; the others come last."""
    return np.array([order.find(byte) % 256 for byte in range(256)])


_RANKS = _ranks(_CLOSING)
_IN_STRING = _ranks(b'"' + _CLOSING)  # if both kinds of brackets are allowed, we are in a string: try a quote first
SEARCH_DETOURS = 200  # most positions that a search visits in addition to the budget
LONGEST_ENDING = 1024


def parser_of(kind: str, source: str, vocabulary: Vocabulary) -> Any:
    """Returns llguidance's matcher at the start. Raises `UserError` with its message for an invalid grammar."""
    from llguidance import LLMatcher

    if kind == "lark":
        grammar = LLMatcher.grammar_from_lark(source)
    else:
        grammar = LLMatcher.grammar_from_json_schema(source)
    matcher = LLMatcher(vocabulary.parser_tokens, grammar, log_level=0)
    if matcher.is_error():
        raise UserError(f"{kind}: {one_line(matcher.get_error())[:300]}")
    return matcher


class ParserMatcher:
    """A `Matcher` over llguidance's parser."""

    def __init__(self, parser: Any, vocabulary: Vocabulary, ending: tuple[int, ...] | None = None):
        self._parser, self._vocabulary = parser, vocabulary
        self._ending = ending  # None: not searched for, or none found
        self._has_ended = False

    def allowed(self, remaining: int) -> np.ndarray:
        """See `Matcher`. The budget is enforced by `take`."""
        if self._has_ended:
            return self._only(self._vocabulary.eos_token_ids)
        bits = np.frombuffer(self._parser.compute_bitmask(), np.uint32)[: self._vocabulary.words].copy()
        if self._parser.is_error():
            raise UserError(f"grammar: the parser gave up: {one_line(self._parser.get_error())[:300]}")
        return bits

    def take(self, tokens: Sequence[int], remaining: int) -> list[int]:
        """See `Matcher`. If no ending was found that fits the budget, tokens are kept unchanged."""
        kept: list[int] = []
        for token in map(int, tokens):
            if self._has_ended:
                break
            ending = self._known_ending(remaining)
            parser = self._parser.deep_copy()
            self.advance([token])
            remaining -= 1
            if self._has_ended:
                return [*kept, token]
            if ending is None:
                kept.append(token)
                continue
            follows = (
                ending[1:] if ending[:1] == (token,) else self._still(ending, remaining) or self._search(remaining)
            )
            if follows is None:
                self._parser = parser
                if not ending:  # the text is complete, but would not be after `token`
                    token = self._vocabulary.eos_token_ids[0]
                    self.advance([token])
                    return [*kept, token]
                self.advance(ending[:1])
                self._ending = ending[1:]
                return [*kept, ending[0]]
            self._ending = follows
            kept.append(token)
        return kept

    def accepts(self, tokens: Sequence[int]) -> int:
        """See `Matcher`."""
        if self._has_ended:
            return 0
        tokens = [int(token) for token in tokens]
        ends = [i for i, token in enumerate(tokens) if token in self._vocabulary.eos_token_ids]
        text = tokens[: ends[0]] if ends else tokens
        count = self._parser.validate_tokens(text)
        if not ends or count < len(text):
            return count
        complete = self._parser.deep_copy()
        complete.consume_tokens(text)
        return count + complete.is_accepting()

    def advance(self, tokens: Sequence[int]) -> None:
        """See `Matcher`."""
        for token in map(int, tokens):
            if self.accepts([token]) != 1:
                raise ValueError(f"token {token} may not come next")
            self._has_ended = token in self._vocabulary.eos_token_ids
            if not self._has_ended:
                self._parser.consume_token(token)
            self._ending = None

    @property
    def is_accepting(self) -> bool:
        """See `Matcher`."""
        return self._has_ended or self._parser.is_accepting()

    @property
    def is_finished(self) -> bool:
        """See `Matcher`."""
        return self._has_ended or self._parser.is_stopped()

    def copy(self) -> "ParserMatcher":
        """See `Matcher`."""
        other = ParserMatcher(self._parser.deep_copy(), self._vocabulary, self._ending)
        other._has_ended = self._has_ended
        return other

    def _only(self, tokens: Sequence[int]) -> np.ndarray:
        bits = np.zeros(self._vocabulary.words, np.uint32)
        for token in tokens:
            bits[token // 32] |= np.uint32(1 << (token % 32))
        return bits

    def _known_ending(self, remaining: int) -> tuple[int, ...] | None:
        """Returns an ending of at most `remaining` tokens from here; None if none was found."""
        if self._ending is None:
            self._ending = self._search(remaining)
        return self._ending

    def _still(self, ending: tuple[int, ...], most: int) -> tuple[int, ...] | None:
        """Returns `ending` if it completes the text here too, as after one more letter of a string; else None."""
        if len(ending) > most or self._parser.validate_tokens(list(ending)) < len(ending):
            return None
        parser = self._parser.deep_copy()
        return ending if parser.consume_tokens(list(ending)) and parser.is_accepting() else None

    def _search(self, most: int) -> tuple[int, ...] | None:
        """Searches for at most `most` tokens that complete the text, depth first in the order of `_CLOSING`.

        Returns None if it finds none.
        """
        parser, found, visited = self._parser.deep_copy(), [], 0
        most = min(most, LONGEST_ENDING)
        limit = most + SEARCH_DETOURS
        # For each position on the path: the number of tokens before it, and the steps left to try (the last is next).
        path: list[tuple[int, list[list[int]]]] = []
        while not parser.is_accepting():
            visited += 1
            steps = self._steps(parser) if len(found) < most and visited <= limit else []
            path.append((len(found), steps))
            while path and not path[-1][1]:
                depth = path.pop()[0]
                if path:
                    parser.rollback(depth - path[-1][0])
                    del found[path[-1][0] :]
            if not path or visited > limit:
                return None
            step = path[-1][1].pop()
            if parser.try_consume_tokens(step) != len(step):
                return None
            found += step
        return tuple(found) if len(found) <= most else None

    def _steps(self, parser: Any) -> list[list[int]]:
        """Returns the possible next steps, best last: the tokens that the grammar forces, or single bytes."""
        if forced := list(parser.compute_ff_tokens()):
            return [forced]
        bits = np.frombuffer(parser.compute_bitmask(), np.uint32)
        own_N, tokens_N = self._vocabulary.own_bytes
        can_come = np.flatnonzero(bits[tokens_N >> 5] >> (tokens_N & 31).astype(np.uint32) & 1)
        bytes_N = own_N[can_come]
        ranks = _IN_STRING if (bytes_N == ord("]")).any() and (bytes_N == ord("}")).any() else _RANKS
        return [[int(token)] for token in tokens_N[can_come[np.argsort(-ranks[bytes_N], kind="stable")]]]
