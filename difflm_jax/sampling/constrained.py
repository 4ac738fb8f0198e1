"""Causal decoding under a grammar: cycles of the speculative loop, run one by one, with masks computed on the host.

A pass masks the logits after the last token and after every proposed token. So accepted tokens are the base's choices
among those that the grammar allows. The text is the same as decoding token by token under the same masks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.sampling.grammar.bits import ALL, words_of
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.speculative import Carry


@dataclasses.dataclass(frozen=True)
class Passes:
    """The compiled halves of a cycle (`speculative.Loop`)."""

    draft: Callable[[Carry, np.ndarray], Carry] | None  # (carry, masks [B, 1, W]); None: no drafting pass
    nodes: Callable[[Carry], Any]  # carry -> `drafts.Nodes`
    verify: Callable[[Carry, np.ndarray], Carry]  # (carry, masks [B, 1 + Q, W])


@dataclasses.dataclass(frozen=True)
class Rows:
    """The matchers of the first rows of a batch, each at its start. The other rows are filler and have none."""

    matchers: Sequence[Matcher]
    limits: np.ndarray  # [B] maximum tokens of each row, prompt included
    vocabulary: int
    eos_token_ids: tuple[int, ...]

    def masks(self, carry: Carry, nodes: Any | None = None) -> np.ndarray:
        """[B, 1 + Q, W] uint32: the tokens that may follow the last token of each row, and each of `nodes`."""
        lengths, done = np.asarray(carry.lengths), np.asarray(carry.done)
        count = 0 if nodes is None else nodes.tokens.shape[1]
        found = np.full((len(lengths), 1 + count, words_of(self.vocabulary)), ALL)
        if nodes is not None:
            proposed = [np.asarray(x) for x in (nodes.tokens, nodes.parents, nodes.valid)]
        for row, matcher in enumerate(self.matchers):
            if done[row]:
                continue
            left = int(self.limits[row] - lengths[row])
            found[row, 0] = matcher.allowed(left)
            if nodes is not None:
                self._follow(found[row], matcher, left, [x[row] for x in proposed])
        return found

    def kept(self, before_B: np.ndarray, carry: Carry) -> Carry:
        """Advances the matchers over the tokens that a pass appended. Returns `carry` with the tokens they keep."""
        tokens, lengths = np.array(carry.tokens), np.array(carry.lengths)
        done, changed = np.array(carry.done), False
        for row, matcher in enumerate(self.matchers):
            new = tokens[row, before_B[row] : lengths[row]].tolist()
            if not new:
                continue
            kept = matcher.take(new, int(self.limits[row] - before_B[row]))
            if kept != new:
                changed, end = True, before_B[row] + len(kept)
                tokens[row, before_B[row] : end], lengths[row] = kept, end
                done[row] = kept[-1] in self.eos_token_ids or end >= self.limits[row]
        if not changed:
            return carry
        return carry.replace(tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths), done=jnp.asarray(done))

    def _follow(self, masks_NW: np.ndarray, matcher: Matcher, left: int, nodes: list[np.ndarray]) -> None:
        """Writes the masks after proposed tokens. Nodes that cannot be accepted keep the full mask, which is unused."""
        places: list[Matcher | None] = [matcher]
        lefts = [left]
        for token, parent, valid in zip(*(x.tolist() for x in nodes), strict=True):
            before, after = places[parent], lefts[parent] - 1
            can_come = valid and before is not None and after > 0 and token not in self.eos_token_ids
            place = before.copy() if can_come and before.accepts([token]) == 1 else None
            places.append(place)
            lefts.append(after)
            if place is not None:
                place.advance([token])
                masks_NW[len(places) - 1] = place.allowed(after)


def run_within(passes: Passes, rows: Rows, carry: Carry) -> Carry:
    """Runs cycles until every row has ended."""
    while not np.asarray(carry.done).all():
        if passes.draft is not None:
            before = np.array(carry.lengths)  # a copy: the buffer is donated to the pass
            carry = rows.kept(before, passes.draft(carry, rows.masks(carry)))
            if np.asarray(carry.done).all():
                break
        before, nodes = np.array(carry.lengths), jax.device_get(passes.nodes(carry))
        carry = rows.kept(before, passes.verify(carry, rows.masks(carry, nodes)))
    return carry
