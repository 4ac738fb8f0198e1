"""A causal model over cached columns: token i of a sequence is column i of its cache.

A pass reads the columns of known tokens and writes none. It returns the keys and values of its own rows, and the caller
writes those that it keeps, in place. Columns after a sequence's length are never seen, and are overwritten later.
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
PREFILL_CHUNK = 256  # columns of a prompt per pass


@struct.dataclass
class Rows:
    """The tokens of a pass. N rows attend to the first `lengths` columns and, where `sees`, to each other."""

    tokens: jax.Array  # [B, N] int32
    positions: jax.Array  # [B, N] int32
    sees: jax.Array  # [B, N, N] bool
    lengths: jax.Array  # [B] int32, columns that are known
    gate: jax.Array | None = None  # [B, N] bool, see `Transformer`. True: with the adapter; None: no row has it


@dataclasses.dataclass(frozen=True)
class ColumnModel:
    """The base model, with its adapter on the rows whose gate is open.

    `is_adapted`: the adapter is on wherever no gate closes it, and its mask row is the mask token's embedding.
    """

    model: Transformer
    variables: dict[str, Any]
    is_adapted: bool = False

    def predict(self, columns: Columns, rows: Rows, at_Bm: jax.Array | None = None) -> tuple[jax.Array, Columns]:
        """Returns (float32 logits [B, N, V], keys and values of the rows). `at_Bm` selects rows: logits [B, m, V]."""
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
        """Writes `kept` into `columns`, in order, from each row's start on."""

        def written(columns_NBKSE: jax.Array, kept_NBKTE: jax.Array) -> jax.Array:
            # Row by row, which XLA does in place. As one scatter, XLA transposed the whole cache and back.
            for row in range(len(starts_B)):
                at = (0, row, 0, starts_B[row], 0)
                columns_NBKSE = jax.lax.dynamic_update_slice(columns_NBKSE, kept_NBKTE[:, row : row + 1], at)
            return columns_NBKSE

        return jax.tree.map(written, columns, kept)

    def prefill(self, tokens_BP: jax.Array, columns: int) -> Columns:
        """Returns a cache of `columns` columns with those of the prompts. Right padding is written but never seen."""
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
            # The last chunk may overlap columns that are already written: it writes the same values.
            start = jnp.minimum(number * chunk, length - chunk)
            kept = self.states(whole, rows(start))[1]
            return self.write(whole, kept, jnp.broadcast_to(start, (batch,)))

        return jax.lax.fori_loop(1, -(-length // chunk), one_chunk, whole)

    def _prefers_two_rows(self, token_11: jax.Array) -> bool:
        # On CPU, XLA multiplies one row of bfloat16 more slowly than two (SmolLM2-135M: 47 ms and 39 ms per pass).
        return self.model.on_cpu and self.model.dtype == jnp.bfloat16 and not stay_in_stacks(self.model, token_11, 1)

    def states(self, columns: Columns | None, rows: Rows) -> tuple[jax.Array, Columns]:
        """Returns (hidden states [B, N, D], keys and values) of the rows. Without columns they see only each other."""
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
