"""Prefix cache: prompts run through the model in chunks, and the columns of chunks are kept for later prompts.

Under the attention rules with kept columns, the columns of a prompt depend only on earlier tokens. A chunk is
identified by all tokens up to its end. Each chunk runs through the same program whether others were cached or not, so
cached columns equal computed ones.
"""

import collections
import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.sampling.columns import ColumnModel, Columns, Rows
from difflm_jax.serving.family import Weights


class Beginnings:
    """An LRU cache of chunks of columns, of at most `most_bytes`, keyed by the hash of all tokens up to their end."""

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._chunks: collections.OrderedDict[bytes, Columns] = collections.OrderedDict()
        self.bytes, self.found, self.asked = 0, 0, 0  # `found`, `asked`: counts of tokens found and looked up

    def get(self, name: bytes, tokens: int) -> Columns | None:
        """Returns the chunk of this name, or None. Counts `tokens` as looked up."""
        self.asked += tokens
        chunk = self._chunks.get(name)
        if chunk is not None:
            self.found += tokens
            self._chunks.move_to_end(name)
        return chunk

    def put(self, name: bytes, chunk: Columns) -> None:
        size = sum(x.nbytes for x in jax.tree.leaves(chunk))
        if name in self._chunks or size > self._most:
            return
        self._chunks[name] = chunk
        self.bytes += size
        while self.bytes > self._most:
            _, oldest = self._chunks.popitem(last=False)
            self.bytes -= sum(x.nbytes for x in jax.tree.leaves(oldest))

    def __contains__(self, name: bytes) -> bool:
        return name in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Computes the columns of prompts. `is_adapted`: with the row's adapter; False: with the base."""

    weights: Weights
    beginnings: Beginnings
    chunk: int
    is_adapted: bool
    owner: bytes  # prefix of cache keys: prompts of the same owner and adapter share columns

    def __call__(self, tokens: np.ndarray, count: int, index: int, room: int) -> tuple[Columns, int]:
        """Returns (columns [N, 1, K, room, E] of at least the first `count` tokens, how many of these were cached)."""
        columns = empty_columns(self.weights, 1, room)
        names = self.names(tokens, index)
        found = 0
        for number in range(-(-count // self.chunk)):
            start = number * self.chunk
            is_whole = start + self.chunk <= len(tokens)
            kept = self.beginnings.get(names[number], self.chunk) if is_whole and found == start else None
            if kept is not None:
                columns = _put(columns, kept, jnp.int32(start))
                found += self.chunk
                continue
            part = np.full((1, self.chunk), self.weights.decoder.pad_token_id, np.int32)
            part[0, : len(tokens) - start] = tokens[start : start + self.chunk]
            columns, kept = _run(self.weights, columns, part, jnp.int32(start), np.array([index]), self.is_adapted)
            if is_whole:
                self.beginnings.put(names[number], kept)
        return columns, min(found, count)

    def keep(self, tokens: np.ndarray, count: int, index: int, columns: Columns, row: int) -> None:
        """Caches the full chunks among the first `count` columns of a row, whose tokens are `tokens`."""
        for number, name in enumerate(self.names(tokens[:count], index)):
            if name not in self.beginnings:
                at = np.array([row, number * self.chunk], np.int32)
                self.beginnings.put(name, _part(columns, at, self.chunk))

    def names(self, tokens: np.ndarray, index: int) -> list[bytes]:
        """Returns the name of each full chunk: a hash of all tokens up to its end."""
        name, names = self.owner + (index.to_bytes(4, "little") if self.is_adapted else b""), []
        for start in range(0, len(tokens) - self.chunk + 1, self.chunk):
            part = np.ascontiguousarray(tokens[start : start + self.chunk], "<i4").tobytes()
            name = hashlib.blake2b(name + part, digest_size=16).digest()
            names.append(name)
        return names


@functools.partial(jax.jit, static_argnums=(1, 2))
def empty_columns(weights: Weights, rows: int, room: int) -> Columns:
    """Returns columns [N, rows, K, room, E] of zeros."""
    return jax.tree.map(
        lambda x: jnp.zeros((x.shape[0], rows, x.shape[2], room, x.shape[4]), x.dtype), _shapes(weights)
    )


@functools.partial(jax.jit, donate_argnums=0)
def insert_row(columns: Columns, one: Columns, row: jax.Array) -> Columns:
    """Writes the columns of one row into `columns`."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice(x, new, (0, row, 0, 0, 0)), columns, one)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def write_after(columns: Columns, kept: Columns, lengths_B: jax.Array, offset: int) -> Columns:
    """Writes `kept` into `columns`, from each row's column `length + offset` on."""
    return ColumnModel(None, {}).write(columns, kept, lengths_B + offset)


@functools.partial(jax.jit, static_argnums=2)
def moved(columns: Columns, rows: jax.Array, room: int) -> Columns:
    """Returns the columns of these rows, padded or cut to `room` columns."""

    def one(x: jax.Array) -> jax.Array:
        x = x[:, rows, :, :room]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, room - x.shape[3]), (0, 0)])

    return jax.tree.map(one, columns)


def model_of(weights: Weights, index_B: jax.Array, is_adapted: bool) -> tuple[ColumnModel, jax.Array | None]:
    """Returns (the model for rows of these family members, their gate [B, 1, R] or None)."""
    variables, gate_BR = weights.of(index_B)
    if not is_adapted:
        variables, gate_BR = {"params": variables["params"]}, None
    return ColumnModel(weights.decoder.model, variables, is_adapted), None if gate_BR is None else gate_BR[:, None]


def _rows(weights: Weights, tokens: jax.Array, start: jax.Array | int, gate: jax.Array | None) -> Rows:
    """Returns the rows of a chunk that begins at column `start`, under the attention rule of prompts."""
    step = jnp.arange(tokens.shape[1])
    diffusion = weights.decoder.diffusion
    last = (
        step - step % diffusion.block_length + diffusion.block_length - 1 if diffusion.blocks_include_prompt else step
    )
    sees = step <= last[:, None]
    batch = len(tokens)
    return Rows(
        tokens=tokens,
        positions=jnp.broadcast_to(start + step, tokens.shape),
        sees=jnp.broadcast_to(sees, (batch, *sees.shape)),
        lengths=jnp.broadcast_to(start, (batch,)),
        gate=gate,
    )


def _shapes(weights: Weights) -> Any:
    def one_column(weights: Weights) -> Columns:
        model, gate = model_of(weights, jnp.zeros(1, jnp.int32), weights.decoder.variables.get("lora") is not None)
        return model.states(None, _rows(weights, jnp.zeros((1, 1), jnp.int32), 0, gate))[1]

    return jax.eval_shape(one_column, weights)


@functools.partial(jax.jit, static_argnames="is_adapted", donate_argnames="columns")
def _run(weights: Weights, columns: Columns, tokens, start, index_B, is_adapted: bool) -> tuple[Columns, Columns]:
    model, gate = model_of(weights, index_B, is_adapted)
    kept = model.states(columns, _rows(weights, tokens, start, gate))[1]
    return model.write(columns, kept, start[None]), kept


@functools.partial(jax.jit, donate_argnums=0)
def _put(columns: Columns, chunk: Columns, start: jax.Array) -> Columns:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice(x, new, (0, 0, 0, start, 0)), columns, chunk)


@functools.partial(jax.jit, static_argnums=2)
def _part(columns: Columns, at: jax.Array, chunk: int) -> Columns:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice(x, (0, at[0], 0, at[1], 0), (x.shape[0], 1, x.shape[2], chunk, x.shape[4])),
        columns,
    )
