"""Causal decoding of a batch: the compiled programs that run its cycles, and the work of the host between them.

Without an observer, all cycles are one program. A watcher is called after each pass. If the host finds an answer
complete (a stop string), its row ends within `BETWEEN_CHECKS` cycles. The cycles, and so the tokens, are the same in
each case.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from difflm_jax.distributed.sharding import over_rows
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.columns import ColumnModel
from difflm_jax.sampling.constrained import Passes, run_within
from difflm_jax.sampling.constrained import Rows as GrammarRows
from difflm_jax.sampling.drafts import Drafting, Nodes
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.options import Sampling
from difflm_jax.sampling.speculative import UNLIMITED, Carry, Loop, Predictor
from difflm_jax.sampling.verified import Caches, DiffusionLoop, verifier
from difflm_jax.sampling.watch import Pass, Watcher

BETWEEN_CHECKS = 8  # cycles between two checks of the host for stop strings


@struct.dataclass
class Task:
    """A decoder and its options. `room`: columns of the cache. `drafter`: a model that drafts by diffusion, if any."""

    decoder: Decoder
    sampling: Sampling
    drafting: Drafting = struct.field(pytree_node=False)
    room: int = struct.field(pytree_node=False)
    drafter: Decoder | None = None

    def begin(self, batch: "Batch") -> tuple[Loop, Carry]:
        """Prefills the prompts and returns the loop and its carry before the first cycle."""
        loop, (base, drafter) = self.loop(batch), self._models
        tokens = jnp.pad(batch.tokens, ((0, 0), (0, self.room - batch.tokens.shape[1])))
        cache = base.prefill(batch.tokens, self.room)
        if drafter is not None:
            cache = Caches(cache, drafter.prefill(batch.tokens, self.room), batch.lengths - 1)
        return loop, loop.start(tokens, batch.lengths, cache)

    def loop(self, batch: "Batch") -> Loop:
        decoder, (base, drafter) = self.decoder, self._models
        fields = {
            "drafting": self.drafting,
            "sampling": self.sampling,
            "limits": batch.limits,
            "keys": batch.keys,
            "vocabulary": decoder.model.config.vocab_size,
            "mask_token_id": decoder.diffusion.mask_token_id,
            "eos_token_ids": decoder.eos_token_ids,
        }
        if drafter is None:
            return Loop(model=Predictor(base.predict, base.write), **fields)
        return DiffusionLoop(model=verifier(base), **fields, drafter=drafter, diffusion=self.drafter.diffusion)

    @property
    def variables(self) -> dict[str, Any]:
        """The collections of each model."""
        each = {"decoder": self.decoder.variables}
        return each if self.drafter is None else {**each, "drafter": self.drafter.variables}

    def with_variables(self, variables: dict[str, Any]) -> "Task":
        drafter = self.drafter and self.drafter.replace(variables=variables["drafter"])
        return self.replace(decoder=self.decoder.replace(variables=variables["decoder"]), drafter=drafter)

    @property
    def _models(self) -> tuple[ColumnModel, ColumnModel | None]:
        base, drafter = ColumnModel(self.decoder.model, self.decoder.variables), self.drafter
        return base, drafter and ColumnModel(drafter.model, drafter.variables, is_adapted=True)


@struct.dataclass
class Batch:
    """Prompts, padded on the right. `limits`: maximum tokens of each row, prompt included."""

    tokens: jax.Array  # [B, P] int32
    lengths: jax.Array  # [B] int32
    limits: jax.Array  # [B] int32
    keys: jax.Array  # [B]


@dataclasses.dataclass(frozen=True)
class Observer:
    """Host callbacks between cycles: `watch` receives each pass, `ended` returns whether an answer is complete."""

    watch: Watcher | None = None
    ended: Callable[[np.ndarray], bool] | None = None

    @property
    def idle(self) -> bool:
        return self.watch is None and self.ended is None


def decode(task: Task, batch: Batch, observer: Observer, rows: Sequence[int]) -> Carry:
    """Decodes `batch` and returns the last carry, reduced to the arrays of its rows (`Carry.slim`).

    `rows`: the indices of the first rows among all prompts; the other rows are filler.
    """
    if task.decoder.mesh is not None:
        return _whole(task, batch)
    carry = _begin(task, batch)
    if observer.watch is None:
        done = observer.idle
        carry = _cycles(task, batch, carry, UNLIMITED if done else BETWEEN_CHECKS)
        while not done and not (done := bool(carry.done.all())):
            carry = _cycles(task, batch, _with_ends(carry, batch, observer), BETWEEN_CHECKS)
        return carry.slim()
    shown = _Shown(task, batch, observer.watch, rows)
    while not bool(carry.done.all()):
        for verifies in (False, True):
            carry, *proposals = _one_pass(task, batch, carry, verifies)
            shown.tell(carry, *proposals)
        carry = _with_ends(carry, batch, observer)
    return carry.slim()


def decode_within(task: Task, batch: Batch, matchers: Sequence[Matcher]) -> Carry:
    """`decode` under a grammar: the same passes, one by one, with token masks computed on the host."""
    passes = Passes(
        draft=functools.partial(_draft, task, batch) if task.drafting.drafts_first else None,
        nodes=functools.partial(_nodes, task, batch),
        verify=functools.partial(_verify, task, batch),
    )
    decoder = task.decoder
    rows = GrammarRows(matchers, np.asarray(batch.limits), decoder.model.config.vocab_size, decoder.eos_token_ids)
    return run_within(passes, rows, _begin(task, batch)).slim()


def _with_ends(carry: Carry, batch: Batch, observer: Observer) -> Carry:
    """Marks the rows done whose answers `observer.ended` finds complete."""
    if observer.ended is None:
        return carry
    tokens, lengths, done = (np.asarray(x) for x in (carry.tokens, carry.lengths, carry.done))
    starts = np.asarray(batch.lengths)
    ended = [not done[i] and observer.ended(tokens[i, starts[i] : lengths[i]]) for i in range(len(done))]
    return carry.replace(done=jnp.asarray(done | ended))


class _Shown:
    """Reports passes to a watcher as `Pass`. Accepted tokens have confidence 1; proposals are the candidates."""

    def __init__(self, task: Task, batch: Batch, watch: Watcher, rows: Sequence[int]):
        self._watch, self._rows, self._number = watch, rows, 0
        self._mask = task.decoder.diffusion.mask_token_id
        self._starts, limits = np.asarray(batch.lengths), np.asarray(batch.limits)
        self._width = int((limits - self._starts).max())
        self._prompts = [np.asarray(batch.tokens[i, : self._starts[i]]) for i in range(len(rows))]
        self._passes, self._known = np.zeros(len(batch.lengths), np.int32), np.zeros(len(rows), np.int32)

    def tell(self, carry: Carry, proposed: jax.Array, probable: jax.Array) -> None:
        """Reports a pass, if there was one."""
        passes = np.asarray(carry.passes)
        if (passes == self._passes).all():
            return
        self._passes, self._number = passes, self._number + 1
        count, column = len(self._rows), np.arange(self._width)
        known = np.asarray(carry.lengths)[:count] - self._starts[:count]
        tokens = np.full((count, self._width), self._mask, np.int32)
        for i, start in enumerate(self._starts[:count]):
            tokens[i, : known[i]] = np.asarray(carry.tokens[i, start : start + known[i]])
        is_known = column < known[:, None]
        proposed, probable = np.asarray(proposed)[:count], np.asarray(probable)[:count]
        candidates = np.full((count, self._width), self._mask, np.int32)
        probabilities = np.zeros((count, self._width), np.float32)
        stops = np.minimum(known + (probable > 0).sum(axis=1), self._width)
        for i, (first, stop) in enumerate(zip(known, stops, strict=True)):
            candidates[i, first:stop] = proposed[i, : stop - first]
            probabilities[i, first:stop] = probable[i, : stop - first]
        block = slice(int(known.min()), int(stops.max()))
        self._watch(
            Pass(
                rows=self._rows,
                number=self._number,
                prompts=self._prompts,
                tokens=tokens,
                real=np.ones_like(is_known),
                confidence=is_known.astype(np.float32),
                written=is_known & (column >= self._known[:, None]),
                block=block,
                candidates=candidates[:, block, None],
                probabilities=probabilities[:, block, None],
            )
        )
        self._known = known


@jax.jit
def _whole(task: Task, batch: Batch) -> Carry:
    """Runs all cycles, with the rows sharded over the devices of the mesh."""

    def rows(variables: dict[str, Any], batch: Batch) -> Carry:
        loop, start = task.with_variables(variables).begin(batch)
        return loop.run(start).slim()

    return over_rows(rows, task.decoder.mesh, task.variables, batch)


@jax.jit
def _begin(task: Task, batch: Batch) -> Carry:
    return task.begin(batch)[1]


@functools.partial(jax.jit, donate_argnames="carry")
def _cycles(task: Task, batch: Batch, carry: Carry, most: int) -> Carry:
    return task.loop(batch).run(carry, most)


@functools.partial(jax.jit, static_argnames="verifies", donate_argnames="carry")
def _one_pass(task: Task, batch: Batch, carry: Carry, verifies: bool) -> tuple[Carry, jax.Array, jax.Array]:
    """Runs half a cycle. Returns the carry, and `Loop.proposals` for the next pass."""
    loop = task.loop(batch)
    carry = loop.verify(carry) if verifies else loop.draft(carry)
    return carry, *loop.proposals(carry)


@functools.partial(jax.jit, donate_argnames="carry")
def _draft(task: Task, batch: Batch, carry: Carry, allowed_B1W: jax.Array) -> Carry:
    return task.loop(batch).draft(carry, allowed_B1W)


@jax.jit
def _nodes(task: Task, batch: Batch, carry: Carry) -> Nodes:
    return task.loop(batch).nodes(carry)


@functools.partial(jax.jit, donate_argnames="carry")
def _verify(task: Task, batch: Batch, carry: Carry, allowed_BNW: jax.Array) -> Carry:
    return task.loop(batch).verify(carry, allowed_BNW)
