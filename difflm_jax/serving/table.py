"""A table of rows that share forward passes: what is common to all kinds of decoding.

A row's numbers lie on the host and go to the device with every pass, as few as they are; columns and drafts stay there.
So a table may change its shape between two passes: it has as few rows and columns as its requests need, in buckets.
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
    """Rows in slots; None where a slot is free."""

    def __init__(self, most_rows: int):
        self.most_rows = most_rows
        self.slots: list[Work | None] = []

    @property
    def works(self) -> list[Work]:
        return [work for work in self.slots if work is not None]

    @abc.abstractmethod
    def admit(self, work: Work) -> None:
        """Gives a request a slot."""

    @abc.abstractmethod
    def step(self) -> None:
        """One pass over all rows."""

    def release(self, work: Work) -> None:
        """Frees the slot of a request."""
        self.slots[self.slots.index(work)] = None

    def groups(self) -> list[tuple[np.ndarray, Sampling]]:
        """Rows by the options that are compiled: (which rows [B], options with a value per row [B])."""
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
        """[B, ...] `value(work)` of each row, `fill` where a slot is free."""
        return np.stack([np.asarray(fill if work is None else value(work)) for work in self.slots])

    def biases(self, vocabulary: int) -> np.ndarray | None:
        """[B, V] float32 that the requests add to logits; None: nothing."""
        if not any(work.request.logit_bias for work in self.works):
            return None
        bias = np.zeros((len(self.slots), vocabulary), np.float32)
        for number, work in enumerate(self.slots):
            for token, amount in work.request.logit_bias if work is not None else ():
                bias[number, token] += amount
        return bias

    def candidates(self) -> int | None:
        """The most candidates that a request wants with its tokens; None: no probabilities."""
        wanted = [work.request.logprobs for work in self.works if work.request.logprobs is not None]
        return max(wanted, default=None)


def rows_bucket(rows: int, most: int) -> int:
    """The rows that are compiled for: 1, 2, 4, 8, ... and the most."""
    return min(1 << (max(rows, 1) - 1).bit_length(), most)


def room_bucket(length: int, smallest: int = SMALLEST_ROOM) -> int:
    """The columns that are compiled for: 128, 192, 256, 384, 512, 768, ..."""
    room = smallest
    while room < length:
        room = room * 3 // 2 if room & (room - 1) == 0 else room * 4 // 3
    return room


@jax.jit
def biased(logits: jax.Array, bias_BV: jax.Array) -> jax.Array:
    """Logits [B, N, V] with what is added to each token's."""
    return logits + bias_BV[:, None]


@jax.jit
def rows_with_nan(logits: jax.Array) -> jax.Array:
    """[B] bool: rows whose logits [B, N, V] hold a NaN."""
    return jnp.isnan(logits).any(axis=(1, 2))


def most_probable(logits: jax.Array, tokens: jax.Array, candidates: int) -> tuple[jax.Array, ...]:
    """(log-probability of `tokens`, candidates and theirs) of the distributions with these logits [..., V]."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    best, found = jax.lax.top_k(log_p, max(candidates, 1))
    return own, found, best


def token_probability(work: Work, token: int, found: tuple[np.ndarray, ...], at: tuple) -> TokenProbability:
    """What `most_probable` found at one place, as far as the request wants it."""
    own, tokens, log_p = (x[at] for x in found)
    pairs = zip(tokens.tolist(), log_p.tolist(), strict=True)
    return TokenProbability(int(token), float(own), tuple(pairs)[: work.request.logprobs])
