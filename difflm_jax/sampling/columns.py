"""A causal model over cached columns: token i of a row is column i, and rows of a pass lie beside the columns.

A pass reads the columns of the tokens that a row has, and writes none: it returns keys and values of its rows, of which
the caller writes those that it keeps, in place. What lies after a row's length is never seen, and is overwritten later.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.models.attention import View
from difflm_jax.models.stacks import in_stacks, stay_in_stacks
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.ops.cpu import bits_of

Columns = Any  # {"layers": {"self_attn": {"k", "v": [N, B, K, S, E]}}}
PREFILL_CHUNK = 256  # columns of a prompt that run at once


@struct.dataclass
class Rows:
    """Tokens of a pass. N rows see the first `lengths` columns and, by `sees`, each other."""

    tokens: jax.Array  # [B, N] int32
    positions: jax.Array  # [B, N] int32
    sees: jax.Array  # [B, N, N] bool
    lengths: jax.Array  # [B] int32, columns that are known
    gate: jax.Array | None = None  # as of `Transformer`: [B, N] bool, True: under the adapter; None: all are the base's


@dataclasses.dataclass(frozen=True)
class ColumnModel:
    """The base and, where the gate of a row is open, the base with its adapter.

    `is_adapted`: the adapter is on wherever no gate says otherwise, and its mask row is the mask token's embedding.
    """

    model: Transformer
    variables: dict[str, Any]
    is_adapted: bool = False

    def predict(self, columns: Columns, rows: Rows, at_Bm: jax.Array | None = None) -> tuple[jax.Array, Columns]:
        """(float32 logits [B, N, V] of each row, keys and values of the rows); logits [B, m, V] of rows `at_Bm`."""
        count = rows.tokens.shape[1]
        if rows.tokens.size == 1 and self._prefers_two_rows(rows.tokens):
            rows = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1) if x.ndim > 1 else x, rows)
        hidden_BND, kept = self.states(columns, rows)
        hidden_BND = hidden_BND[:, :count]
        if at_Bm is not None:
            hidden_BND = jnp.take_along_axis(hidden_BND, at_Bm[:, :, None], axis=1)
        in_place = stay_in_stacks(self.model, rows.tokens, rows.tokens.size)
        return head_logits(self.model.config, self.variables["params"], None, None, hidden_BND, in_place), kept

    def write(self, columns: Columns, kept: Columns, starts_B: jax.Array) -> Columns:
        """`columns` with those of `kept`, in their order, from each row's start on."""

        def written(columns_NBKSE: jax.Array, kept_NBKTE: jax.Array) -> jax.Array:
            # Row by row, which XLA does in place; as one scatter it turned the whole cache around and back.
            for row in range(len(starts_B)):
                at = (0, row, 0, starts_B[row], 0)
                columns_NBKSE = jax.lax.dynamic_update_slice(columns_NBKSE, kept_NBKTE[:, row : row + 1], at)
            return columns_NBKSE

        return jax.tree.map(written, columns, kept)

    def prefill(self, tokens_BP: jax.Array, columns: int) -> Columns:
        """The columns of prompts, in room for `columns`. Padding on the right is written too, and never seen."""
        batch, length = tokens_BP.shape
        chunk = min(length, PREFILL_CHUNK)
        step = jnp.arange(chunk)
        causal = jnp.broadcast_to(step <= step[:, None], (batch, chunk, chunk))

        def rows(start: jax.Array | int) -> Rows:
            tokens = jax.lax.dynamic_slice_in_dim(tokens_BP, start, chunk, axis=1)
            positions = jnp.broadcast_to(start + step, (batch, chunk))
            return Rows(tokens, positions, causal, jnp.broadcast_to(start, (batch,)))

        first = self.states(None, rows(0))[1]
        room = [(0, 0)] * 3 + [(0, columns - chunk), (0, 0)]
        whole = jax.tree.map(lambda x: jnp.pad(x, room), first)
        if length <= chunk:
            return whole

        def one_chunk(number: jax.Array, whole: Columns) -> Columns:
            # The last chunk may reach back over columns that are there already: it writes the same into them.
            start = jnp.minimum(number * chunk, length - chunk)
            kept = self.states(whole, rows(start))[1]
            return self.write(whole, kept, jnp.broadcast_to(start, (batch,)))

        return jax.lax.fori_loop(1, -(-length // chunk), one_chunk, whole)

    def _prefers_two_rows(self, token_11: jax.Array) -> bool:
        # XLA's CPU backend multiplies one row of bfloat16 more slowly than two (SmolLM2-135M: 47 ms and 39 ms a pass).
        return self.model.on_cpu and self.model.dtype == jnp.bfloat16 and not stay_in_stacks(self.model, token_11, 1)

    def states(self, columns: Columns | None, rows: Rows) -> tuple[jax.Array, Columns]:
        """(hidden states [B, N, D], keys and values) of the rows; without columns they see each other alone."""
        variables = {"params": self.variables["params"]}
        view = View(rows.sees, rows.positions, rows.positions)
        if columns is not None:
            size = jax.tree.leaves(columns)[0].shape[3]
            known = jnp.arange(size) < rows.lengths[:, None, None]
            mask = jnp.concatenate([jnp.broadcast_to(known, (*rows.tokens.shape, size)), rows.sees], axis=2)
            of_columns = jnp.broadcast_to(jnp.arange(size), (len(rows.tokens), size))
            view = View(mask, rows.positions, jnp.concatenate([of_columns, rows.positions], axis=1))
            variables["columns"] = columns
        if self.is_adapted:
            variables |= self.variables
        elif rows.gate is not None:
            variables["lora"] = {name: leaf for name, leaf in self.variables["lora"].items() if name != "mask_row"}
        if stay_in_stacks(self.model, rows.tokens, rows.tokens.size):
            variables = in_stacks(variables, self.model.config, rows.tokens.size)
        hidden, updated = self.model.apply(
            variables, rows.tokens, rows.positions, view, gate_BT=rows.gate, mutable=["rows"]
        )
        return hidden, bits_of(updated["rows"]) if self.model.on_cpu else updated["rows"]
