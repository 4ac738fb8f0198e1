"""Regular expressions, and lists of texts, as deterministic automata over bytes.

Expressions are parsed by Python's `re` and have the meaning of `re.fullmatch`, but \\d, \\w and \\s match only ASCII. A
model asked for a date should not write it in any of Unicode's 80 sets of digits. Look-around, and syntax that no finite
automaton can express, is rejected by name.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from difflm_jax.errors import UserError, one_line

try:  # the parser of `re`: private under this name, as `sre_parse` deprecated
    from re import _constants as ops
    from re import _parser as parser
except ImportError as error:  # pragma: no cover - a Python that moved it
    raise ImportError("this Python keeps the parser of `re` elsewhere") from error

MOST_STATES = 4096
MOST_WORK = 500_000  # steps to build an automaton: an untrusted expression must not block a server
Ranges = list[tuple[int, int]]  # of code points, both ends included
_LAST, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)


@dataclasses.dataclass(frozen=True)
class ByteAutomaton:
    """An automaton over bytes. State 0 is the start; every state can reach an accepting one."""

    delta: np.ndarray  # [S, 256] int32, the next state; -1: not allowed
    accepting: np.ndarray  # [S] bool


def of_regex(pattern: str) -> ByteAutomaton:
    """Builds the automaton of the texts that `pattern` fully matches. Raises `UserError`."""
    try:
        parsed = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"regex: {one_line(error)}") from error
    if parsed.state.flags & (re.IGNORECASE | re.LOCALE | re.MULTILINE):
        raise UserError("regex: the flags i, m and L are not supported")
    try:
        return _Builder(parsed.state.flags).automaton(parsed)
    except RecursionError as error:
        raise UserError("regex: nested too deeply") from error


def of_texts(texts: Sequence[str]) -> ByteAutomaton:
    """Builds the automaton that accepts exactly the given texts. Raises `UserError`."""
    builder = _Builder(0)
    ends = [builder.bytes(builder.start, text.encode("utf-8")) for text in texts]
    return builder.deterministic(ends)


class _Builder:
    """Builds a nondeterministic automaton: states are numbers, edges have ranges of bytes or are empty."""

    def __init__(self, flags: int):
        self._flags, self._work = flags, 0
        self._moves: list[list[tuple[int, int, int]]] = []
        self._empty: list[list[int]] = []
        self.start = self._state()

    def automaton(self, parsed: parser.SubPattern) -> ByteAutomaton:
        items = list(parsed)
        if items and items[0] == (ops.AT, ops.AT_BEGINNING):
            items = items[1:]
        if items and items[-1] == (ops.AT, ops.AT_END):
            items = items[:-1]
        return self.deterministic([self._sequence(self.start, items)])

    def bytes(self, state: int, text: bytes) -> int:
        for byte in text:
            state = self._move(state, [(byte, byte)])
        return state

    def deterministic(self, ends: Sequence[int]) -> ByteAutomaton:
        """Applies the subset construction, then drops the states that reach no accepting one."""
        closures = functools.lru_cache(maxsize=None)(self._closure)
        first = closures(frozenset([self.start]))
        number, queue, rows = {first: 0}, [first], []
        for states in queue:  # the loop appends to it
            row = np.full(256, -1, np.int32)
            moves = [move for state in states for move in self._moves[state]]
            cuts = sorted({low for low, _, _ in moves} | {high + 1 for _, high, _ in moves})
            self._worked(len(cuts) * len(moves) // 10 + len(states))
            for low, end in itertools.pairwise(cuts):
                targets = frozenset(target for a, b, target in moves if a <= low <= b)
                if targets:
                    after = closures(targets)
                    if after not in number:
                        number[after] = len(queue)
                        queue.append(after)
                        if len(queue) > MOST_STATES:
                            raise UserError(f"grammar: more than {MOST_STATES} states; make it simpler")
                    row[low:end] = number[after]
            rows.append(row)
        accepting = np.array([not states.isdisjoint(ends) for states in queue])
        return _trimmed(np.stack(rows), accepting)

    def _closure(self, states: frozenset[int]) -> frozenset[int]:
        found, todo = set(states), list(states)
        while todo:
            for state in self._empty[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)

    def _state(self) -> int:
        self._moves.append([])
        self._empty.append([])
        return len(self._moves) - 1

    def _move(self, state: int, ranges: Sequence[tuple[int, int]], target: int | None = None) -> int:
        target = self._state() if target is None else target
        self._moves[state] += [(low, high, target) for low, high in ranges]
        self._worked(len(ranges))
        return target

    def _worked(self, steps: int) -> None:
        self._work += steps
        if self._work > MOST_WORK:
            raise UserError("regex: too large; repeat less, or name fewer characters")

    def _sequence(self, state: int, items: Sequence) -> int:
        self._worked(1)
        for operation, argument in items:
            state = self._item(state, operation, argument)
        return state

    def _item(self, state: int, operation: Any, argument: Any) -> int:
        if operation is ops.BRANCH:
            end = self._state()
            for branch in argument[1]:
                self._empty[self._sequence(state, branch)].append(end)
            return end
        if operation is ops.SUBPATTERN:
            _, added, removed, items = argument
            if added or removed:
                raise UserError("regex: flags within a group are not supported")
            return self._sequence(state, items)
        if operation in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            return self._repeat(state, *argument)
        return self._characters(state, _ranges(operation, argument, self._flags))

    def _repeat(self, state: int, least: int, most: int, items: Sequence) -> int:
        for _ in range(least):
            state = self._sequence(state, items)
        if most == ops.MAXREPEAT:
            entry = self._state()
            self._empty[state].append(entry)
            self._empty[self._sequence(entry, items)].append(entry)
            return entry
        end = self._state()
        for _ in range(most - least):
            self._empty[state].append(end)
            state = self._sequence(state, items)
        self._empty[state].append(end)
        return end

    def _characters(self, state: int, ranges: Ranges) -> int:
        end = self._state()
        rests = {(): end}  # remaining bytes -> state; characters with equal last bytes share states
        for low, high in ranges:
            for encoded in map(tuple, _encoded(low, high)):
                for place in range(len(encoded) - 1, 0, -1):
                    if encoded[place:] not in rests:
                        rests[encoded[place:]] = self._state()
                        self._move(rests[encoded[place:]], encoded[place : place + 1], rests[encoded[place + 1 :]])
                self._move(state, encoded[:1], rests[encoded[1:]])
        return end


def _ranges(operation: Any, argument: Any, flags: int) -> Ranges:
    """Returns the code points of one item that matches a character. Raises `UserError` for other items."""
    if operation is ops.LITERAL:
        return _without_surrogates([(argument, argument)])
    if operation is ops.NOT_LITERAL:
        return _complement([(argument, argument)])
    if operation is ops.ANY:
        return _complement([] if flags & re.DOTALL else [(10, 10)])
    if operation is ops.IN:
        found: Ranges = []
        negated = argument[0][0] is ops.NEGATE
        for kind, value in argument[negated:]:
            if kind is ops.RANGE:
                found.append(value)
            elif kind is ops.CATEGORY:
                found += _category(value, bool(flags & re.ASCII))
            else:
                found.append((value, value))
        return _complement(found) if negated else _without_surrogates(found)
    raise UserError(f"regex: {str(operation).lower()} is not supported: no look-around, back-references or anchors")


def _category(category: Any, only_ascii: bool) -> Ranges:
    """Returns the code points of \\d, \\w, \\s in ASCII. \\D, \\W, \\S are the complements of Python's own classes."""
    name = str(category).removeprefix("CATEGORY_")
    if name.startswith("NOT_"):
        return _complement(_members(name.removeprefix("NOT_"), only_ascii))
    return list(_members(name, True))


@functools.cache
def _members(name: str, only_ascii: bool) -> tuple[tuple[int, int], ...]:
    tests: dict[str, Callable[[str], bool]] = {
        "DIGIT": str.isdecimal,
        "SPACE": str.isspace,
        "WORD": lambda character: character.isalnum() or character == "_",
    }
    last = 127 if only_ascii else _LAST
    if only_ascii and name == "SPACE":  # str.isspace includes the separators 28 to 31, re.ASCII does not
        return ((9, 13), (32, 32))
    inside = np.fromiter((tests[name](chr(point)) for point in range(last + 1)), bool, last + 1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return tuple((int(low), int(end) - 1) for low, end in zip(edges[::2], edges[1::2], strict=True))


def _complement(ranges: Sequence[tuple[int, int]]) -> Ranges:
    found, at = [], 0
    for low, high in sorted([*ranges, _SURROGATES]):
        if at < low:
            found.append((at, low - 1))
        at = max(at, high + 1)
    return [*found, (at, _LAST)] if at <= _LAST else found


def _without_surrogates(ranges: Ranges) -> Ranges:
    return _complement(_complement(ranges))


def _encoded(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the UTF-8 encodings of code points `low` to `high`, as products of byte ranges."""
    for bound in (0x7F, 0x7FF, 0xFFFF):  # the last code point of each encoded length
        if low <= bound < high:
            yield from _encoded(low, bound)
            yield from _encoded(bound + 1, high)
            return
    if high > 0x7F:
        for mask in (0x3F, 0xFFF, 0x3FFFF):  # bits of the last bytes: a range of first bytes needs all their values
            if low | mask != high | mask:
                if low & mask:
                    yield from _encoded(low, low | mask)
                    yield from _encoded((low | mask) + 1, high)
                    return
                if high & mask != mask:
                    yield from _encoded(low, (high & ~mask) - 1)
                    yield from _encoded(high & ~mask, high)
                    return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))


def _trimmed(delta: np.ndarray, accepting: np.ndarray) -> ByteAutomaton:
    """Drops the states that reach no accepting one; the start stays."""
    alive = accepting.copy()
    while True:
        more = alive | (alive[delta] & (delta >= 0)).any(axis=1)
        if (more == alive).all():
            break
        alive = more
    alive[0] = True
    number = np.where(alive, np.cumsum(alive) - 1, -1).astype(np.int32)
    kept = delta[alive]
    return ByteAutomaton(np.where(kept >= 0, number[kept], -1).astype(np.int32), accepting[alive])
