"""The base class of tables: rows that share forward passes, in any decoding loop.

A row's small arrays are stored on the host and sent to the device with every pass; columns and drafts stay there. So a
table may change shape between two passes. It has only the rows and columns that its requests need, rounded to buckets.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.sampling.options import Sampling
from difflm_jax.serving.requests import TokenProbability
from difflm_jax.serving.work import Work

SMALLEST_ROOM = 128


class Table(abc.ABC):
    """Rows in slots; a free slot is None."""

    def __init__(self, most_rows: int):
        self.most_rows = most_rows
        self.slots: list[Work | None] = []

    @property
    def works(self) -> list[Work]:
        return [work for work in self.slots if work is not None]

    @abc.abstractmethod
    def admit(self, work: Work) -> None:
        """Assigns a slot to a request."""

    @abc.abstractmethod
    def step(self) -> None:
        """Runs one pass over all rows."""

    def release(self, work: Work) -> None:
        """Frees the slot of a request."""
        self.slots[self.slots.index(work)] = None

    def groups(self) -> list[tuple[np.ndarray, Sampling]]:
        """Groups rows by their static options. Returns (rows [B] bool, options with a value per row [B]) of each."""
        rows_of: dict[Any, list[int]] = {}
        for number, work in enumerate(self.slots):
            if work is not None:
                rows_of.setdefault(jax.tree.structure(work.request.sampling), []).append(number)
        groups = []
        for structure, rows in rows_of.items():
            first = jax.tree.leaves(self.slots[rows[0]].request.sampling)
            values = np.tile(np.asarray(first, np.float32)[:, None], len(self.slots))
            for row in rows:
                values[:, row] = jax.tree.leaves(self.slots[row].request.sampling)
            is_in = np.zeros(len(self.slots), bool)
            is_in[rows] = True
            groups.append((is_in, jax.tree.unflatten(structure, list(values))))
        return groups

    def per_row(self, value: Any, fill: Any) -> np.ndarray:
        """[B, ...] `value(work)` of each row; `fill` for free slots."""
        return np.stack([np.asarray(fill if work is None else value(work)) for work in self.slots])

    def biases(self, vocabulary: int) -> np.ndarray | None:
        """[B, V] float32 added to the logits; None if no request has a bias."""
        if not any(work.request.logit_bias for work in self.works):
            return None
        bias = np.zeros((len(self.slots), vocabulary), np.float32)
        for number, work in enumerate(self.slots):
            for token, amount in work.request.logit_bias if work is not None else ():
                bias[number, token] += amount
        return bias

    def candidates(self) -> int | None:
        """Returns the maximum candidates per token over the requests; None if none wants probabilities."""
        wanted = [work.request.logprobs for work in self.works if work.request.logprobs is not None]
        return max(wanted, default=None)


def rows_bucket(rows: int, most: int) -> int:
    """Rounds a number of rows up to one that is compiled for: 1, 2, 4, 8, ... and `most`."""
    return min(1 << (max(rows, 1) - 1).bit_length(), most)


def room_bucket(length: int, smallest: int = SMALLEST_ROOM) -> int:
    """Rounds a number of columns up to one that is compiled for: 128, 192, 256, 384, 512, 768, ..."""
    room = smallest
    while room < length:
        room = room * 3 // 2 if room & (room - 1) == 0 else room * 4 // 3
    return room


@jax.jit
def biased(logits: jax.Array, bias_BV: jax.Array) -> jax.Array:
    """Adds `bias_BV` to logits [B, N, V]."""
    return logits + bias_BV[:, None]


@jax.jit
def rows_with_nan(logits: jax.Array) -> jax.Array:
    """[B] bool: rows whose logits [B, N, V] contain a NaN."""
    return jnp.isnan(logits).any(axis=(1, 2))


def most_probable(logits: jax.Array, tokens: jax.Array, candidates: int) -> tuple[jax.Array, ...]:
    """Returns (log-probability of `tokens`, top candidates, their log-probabilities) under logits [..., V]."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    best, found = jax.lax.top_k(log_p, max(candidates, 1))
    return own, found, best


def token_probability(work: Work, token: int, found: tuple[np.ndarray, ...], at: tuple) -> TokenProbability:
    """Selects the results of `most_probable` at one place, with the candidates that the request wants."""
    own, tokens, log_p = (x[at] for x in found)
    pairs = zip(tokens.tolist(), log_p.tolist(), strict=True)
    return TokenProbability(int(token), float(own), tuple(pairs)[: work.request.logprobs])
