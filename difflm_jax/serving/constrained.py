"""Canvas rows under a grammar: the tokens that a pass may commit, and which of its choices it commits.

Places count the tokens of the answer. A table's columns have gaps if the row's blocks are shorter than the table's.
"""

from collections.abc import Sequence

import numpy as np

from difflm_jax.sampling.grammar.bits import ALL, words_of
from difflm_jax.sampling.loop import Attempt
from difflm_jax.serving.canvas import CanvasRow
from difflm_jax.serving.work import Work


def allowed(works: Sequence[Work | None], active_B: np.ndarray, width: int, vocabulary: int) -> np.ndarray:
    """[B, T, W] uint32: the tokens that may be committed in each row's active block; all without a grammar."""
    found = np.full((len(works), width, words_of(vocabulary)), ALL)
    for slot, row in _rows(works, active_B):
        places, shift = _places(row)
        if len(places):
            at = slice(places.start + shift, places.stop + shift)
            found[slot, at] = row.grammar.masks(row.whole_answer(), places)
    return found


def settled(works: Sequence[Work | None], active_B: np.ndarray, attempt: Attempt) -> tuple[np.ndarray, np.ndarray]:
    """Applies the grammars of the active rows to an attempt. Returns (commit [B, T] bool, tokens [B, T] int32)."""
    commit, tokens, score = (np.array(x) for x in (attempt.commit, attempt.proposal.tokens, attempt.proposal.score))
    for slot, row in _rows(works, active_B):
        places, shift = _places(row)
        columns = np.flatnonzero(commit[slot])
        columns = columns[np.argsort(-score[slot, columns], kind="stable")]
        columns = columns[(columns >= places.start + shift) & (columns < places.stop + shift)]
        noisy = attempt.proposal.noisy[slot]
        found = row.grammar.settled(
            row.whole_answer(), columns - shift, tokens[slot, columns], lambda place, x=noisy, to=shift: x[place + to]
        )
        commit[slot, columns] = False
        for place, token in found.items():
            commit[slot, place + shift], tokens[slot, place + shift] = True, token
    return commit, tokens


def _rows(works: Sequence[Work | None], active_B: np.ndarray) -> list[tuple[int, CanvasRow]]:
    """Returns (slot, row) of the active rows that have a grammar."""
    return [(slot, works[slot].row) for slot in np.flatnonzero(active_B) if works[slot].row.grammar is not None]


def _places(row: CanvasRow) -> tuple[range, int]:
    """Returns (places of the answer in the active block, the offset from a place to its column in that block)."""
    start = row.block * row.block_length  # of the block, in the rest
    shift = row.grammar.offset - start
    return range(max(-shift, 0), max(min(row.block_length - shift, row.grammar.most), max(-shift, 0))), shift
