"""Rows that are decoded from left to right: causal decoding, and speculative decoding with any strategy.

A pass is that of `sampling.speculative.Loop`. All rows share its forward pass. The update after it is computed for each
group of options, and each row takes that of its group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.batching import answer_plan
from difflm_jax.sampling.causal import PLAIN, drafting_of
from difflm_jax.sampling.columns import ColumnModel, Columns
from difflm_jax.sampling.drafts import Drafting, Drafts
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.options import SPECULATIVE, Sampling
from difflm_jax.sampling.speculative import Carry, Loop, Predictor
from difflm_jax.serving.beginnings import Prefill, empty_columns, insert_row, moved, write_after
from difflm_jax.serving.family import Weights
from difflm_jax.serving.grammars import allowed, matcher_of, within
from difflm_jax.serving.grammars import kept as kept_by
from difflm_jax.serving.requests import Draft, Request
from difflm_jax.serving.table import (
    Table,
    biased,
    most_probable,
    room_bucket,
    rows_bucket,
    rows_with_nan,
    token_probability,
)
from difflm_jax.serving.work import Row, Work, key_of


class ContinuedRow(Row):
    """The known tokens of a row, prompt first, and its counts of passes. Raises `UserError` for invalid requests."""

    def __init__(self, lm: LanguageModel, request: Request):
        is_speculative = request.sampling.algorithm == SPECULATIVE
        self.drafting = drafting_of(lm.diffusion, request.sampling, request.block_length) if is_speculative else PLAIN
        if not is_speculative:  # raises the same errors as `generate`
            answer_plan(lm.diffusion, request.max_new_tokens, request.steps, request.block_length, request.sampling)
        if request.logprobs is not None:  # log-probabilities need a single chain
            self.drafting = dataclasses.replace(self.drafting, beside=0)
        if request.logprobs is not None and self.drafting.strategy == "tree":
            raise UserError("logprobs: strategy='tree' keeps none: take another strategy")
        self.prompt, self.limit = len(request.tokens), len(request.tokens) + request.max_new_tokens
        lm.answers.check_length(self.limit)
        self.tokens = np.asarray(request.tokens, np.int32)
        masks = np.full(request.max_new_tokens, lm.mask_token_id, np.int32)
        self.key = key_of(request, np.concatenate([self.tokens, masks]))
        self.matcher = matcher_of(lm, request)
        self.verified, self.accepted = 0, np.zeros(self.drafting.deepest, np.int32)
        self._room = self.limit

    @property
    def acceptance(self) -> float | None:
        return float(self.accepted.sum() / max(self.verified, 1)) if self.drafting.num_nodes else None

    def final(self) -> np.ndarray:
        return self.tokens[self.prompt :]

    answer = final

    def draft(self) -> Draft:
        tokens = self.final()
        everywhere = np.ones(len(tokens), bool)
        return Draft(tokens, everywhere, ~everywhere)


class Continued(Table):
    """A table of `ContinuedRow`s."""

    def __init__(self, prefill: Prefill, drafting: Drafting, most_rows: int):
        super().__init__(most_rows)
        self._prefill, self._weights = prefill, prefill.weights
        self._spec = Spec(drafting, self._weights.decoder.model.config.vocab_size)
        self._columns: Columns | None = None
        self._drafts: Drafts | None = None
        self._room = 0

    def admit(self, work: Work) -> None:
        row = work.row
        self._resize(work)
        one, row.cached = self._prefill(row.tokens, row.prompt - 1, work.index, self._room)
        slot = self.slots.index(None)
        self._columns = insert_row(self._columns, one, jnp.int32(slot))
        self._drafts = _without_drafts(self._drafts, slot)
        self.slots[slot] = work

    def release(self, work: Work) -> None:
        row = work.row
        if row.error is None:
            self._prefill.keep(row.tokens, len(row.tokens) - 1, work.index, self._columns, self.slots.index(work))
        super().release(work)
        if not self.works:
            self.slots, self._columns, self._drafts, self._room = [], None, None, 0

    def step(self) -> None:
        self._resize()
        carry, rows = self._carry(), self._rows()
        groups, bias = self.groups(), self.biases(self._spec.vocabulary)
        found: list[tuple] = []
        failed = np.zeros(len(self.slots), bool)
        for drafts_now in (True, False) if self._spec.drafting.drafts_first else (False,):
            logits, kept = _ask(self._spec, self._weights, self._columns, carry, rows, drafts_now)
            if bias is not None:
                logits = biased(logits, bias)
            logits = self._within(logits, carry, rows, drafts_now)
            after = [
                _advanced(self._spec, self._weights, carry, rows, (logits, kept, sampling), drafts_now)
                for _, sampling in groups
            ]
            before, before_done = carry.lengths, carry.done
            carry = after[0] if len(after) == 1 else _each_its_own([is_in for is_in, _ in groups], after)
            self._columns = write_after(self._columns, carry.cache, before, -1)
            carry = carry.replace(cache=None)
            if matchers := self._matchers():
                carry, errors = kept_by(carry, np.asarray(before), matchers, self._weights.decoder.eos_token_ids)
                self._fail(errors)
            if self.candidates() is not None:
                new = carry.lengths - before  # the verifying pass of a cycle appends more tokens
                possible = _without_mask(logits, self._weights.decoder.diffusion.mask_token_id)
                found.append((before, new, _probabilities(carry.tokens, before, possible, self.candidates())))
            failed |= np.asarray(rows_with_nan(logits)) & ~np.asarray(before_done)
        self._drafts = carry.drafts
        self._take(jax.device_get(carry.replace(drafts=None)), jax.device_get(found), failed)

    def _matchers(self) -> dict[int, tuple[Matcher, int]]:
        """Returns {slot: (matcher, limit)} of each unfinished row under a grammar."""
        rows = {slot: work.row for slot, work in enumerate(self.slots) if work is not None}
        return {
            slot: (row.matcher, row.limit) for slot, row in rows.items() if row.matcher and not (row.done or row.error)
        }

    def _within(self, logits: jax.Array, carry: Carry, rows: "RowData", drafts_now: bool) -> jax.Array:
        """Sets logits to -inf where the grammars of the rows do not allow the token."""
        if not (matchers := self._matchers()):
            return logits
        nodes, spec = (), self._spec
        if not drafts_now:
            nodes = jax.device_get(_proposed(spec, self._weights, carry, rows))
        lengths, count = np.asarray(carry.lengths), 1 + (nodes[0].shape[1] if nodes else 0)
        masks = np.ones((len(self.slots), count, spec.vocabulary), bool)
        for slot, (matcher, limit) in matchers.items():
            own = tuple(x[slot] for x in nodes) or (np.zeros(0, np.int32),) * 3
            left = limit - int(lengths[slot])
            if left > 0 and not np.asarray(carry.done)[slot]:
                try:
                    masks[slot] = allowed(matcher, left, own, spec.vocabulary, self._weights.decoder.eos_token_ids)
                except (UserError, ValueError) as error:
                    self._fail({slot: str(error)})
        return within(logits, masks)

    def _fail(self, errors: dict[int, str]) -> None:
        for slot, error in errors.items():
            self.slots[slot].row.error = error

    def _take(self, carry: Carry, found: list[tuple], failed: np.ndarray) -> None:
        for slot, work in enumerate(self.slots):
            if work is None:
                continue
            row = work.row
            if failed[slot]:
                row.error = row.error or "the model computed a number that is not one (NaN)"
            if row.error is not None:
                continue
            length = int(carry.lengths[slot])
            row.tokens = carry.tokens[slot, :length].copy()
            row.done, row.passes = bool(carry.done[slot]), int(carry.passes[slot])
            row.verified, row.accepted = int(carry.verified[slot]), carry.accepted[slot]
            if work.request.logprobs is None:
                continue
            for before, new, probabilities in found:
                for place in range(int(new[slot])):
                    token = row.tokens[before[slot] + place]
                    row.logprobs += (token_probability(work, token, probabilities, (slot, place)),)

    def _carry(self) -> Carry:
        tokens = np.zeros((len(self.slots), self._room), np.int32)
        for slot, work in enumerate(self.slots):
            if work is not None:
                tokens[slot, : len(work.row.tokens)] = work.row.tokens
        return Carry(
            tokens=tokens,
            lengths=self.per_row(lambda work: np.int32(len(work.row.tokens)), np.int32(1)),
            done=self.per_row(lambda work: work.row.done, True),
            passes=self.per_row(lambda work: np.int32(work.row.passes), np.int32(0)),
            verified=self.per_row(lambda work: np.int32(work.row.verified), np.int32(0)),
            accepted=self.per_row(lambda work: work.row.accepted, np.zeros(self._spec.drafting.deepest, np.int32)),
            drafts=self._drafts,
            cache=None,
        )

    def _rows(self) -> "RowData":
        return RowData(
            limits=self.per_row(lambda work: np.int32(work.row.limit), np.int32(self._room)),
            keys=self.per_row(lambda work: work.row.key, np.zeros(2, np.uint32)),
            index=self.per_row(lambda work: np.int32(work.index), np.int32(0)),
        )

    def _resize(self, new: Work | None = None) -> None:
        """Resizes the table to the rows and columns that its requests and `new` need. Columns never shrink."""
        works = [*self.works, *([] if new is None else [new])]
        longest = max(work.row.limit for work in works) + self._spec.drafting.deepest + 1
        chunk = self._prefill.chunk
        room = max(room_bucket(longest), -(-max(work.row.prompt for work in works) // chunk) * chunk)
        room = max(room, self._room)
        batch = rows_bucket(len(works), self.most_rows)
        if self._columns is not None and (batch, room) == (len(self.slots), self._room):
            return
        used = [slot for slot, work in enumerate(self.slots) if work is not None]
        rows = np.array(used + [0] * (batch - len(used)), np.int32)
        if self._columns is None:
            self._columns = empty_columns(self._weights, batch, room)
            self._drafts = _fresh_drafts(self._spec, self._weights, batch)
        else:
            self._columns = moved(self._columns, rows, room)
            self._drafts = _moved_drafts(self._drafts, rows)
        self.slots = [self.slots[slot] for slot in used] + [None] * (batch - len(used))
        self._room = room


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments of the compiled functions, other than shapes and options."""

    drafting: Drafting
    vocabulary: int

    def loop(self, weights: Weights, rows: "RowData", sampling: Sampling) -> Loop:
        """Returns the loop for one pass. Its cache after the pass is the columns to write."""
        decoder = weights.decoder
        return Loop(
            model=Predictor(predict=None, write=lambda _, kept, __: kept),
            drafting=self.drafting,
            sampling=jax.tree.map(lambda value_B: value_B[:, None, None], sampling),
            limits=rows.limits,
            keys=jax.random.wrap_key_data(rows.keys),
            vocabulary=self.vocabulary,
            mask_token_id=decoder.diffusion.mask_token_id,
            eos_token_ids=decoder.eos_token_ids,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowData:
    """The constants of each row while it is decoded."""

    limits: jax.Array  # [B] int32
    keys: jax.Array  # [B, 2] uint32
    index: jax.Array  # [B] int32, of the model in its family


@functools.partial(jax.jit, static_argnames=("spec", "drafts_now"))
def _ask(
    spec: Spec, weights: Weights, columns: Columns, carry: Carry, rows: RowData, drafts_now: bool
) -> tuple[jax.Array, Columns]:
    """Runs the model on the rows of a pass. Returns (logits [B, N, V], keys and values)."""
    loop = spec.loop(weights, rows, Sampling())
    asked = loop.rows_to_draft(carry) if drafts_now else loop.rows_to_verify(carry)
    variables, owner_BR = weights.of(rows.index)
    if owner_BR is not None and asked.gate is not None:
        asked = asked.replace(gate=asked.gate[..., None] & owner_BR[:, None])
    return ColumnModel(weights.decoder.model, variables).predict(columns, asked)


@functools.partial(jax.jit, static_argnames="spec")
def _proposed(spec: Spec, weights: Weights, carry: Carry, rows: RowData) -> tuple[jax.Array, ...]:
    """Returns (tokens, parents, valid) [B, Q] of the nodes that a verifying pass verifies."""
    nodes = spec.loop(weights, rows, Sampling()).nodes(carry)
    return nodes.tokens, nodes.parents, nodes.valid


@functools.partial(jax.jit, static_argnames=("spec", "drafts_now"))
def _advanced(spec: Spec, weights: Weights, carry: Carry, rows: RowData, answer: tuple, drafts_now: bool) -> Carry:
    """Returns the carry after a pass under one set of options; its cache is the columns to write."""
    logits, kept, sampling = answer
    loop = spec.loop(weights, rows, sampling)
    if drafts_now:
        after = loop.drafted(carry, loop.needs_drafts(carry), logits, kept)
    else:
        after = loop.verified(carry, logits, kept)
    if after.drafts is not None and after.drafts.logits is None:
        after = after.replace(drafts=after.drafts.replace(logits=carry.drafts.logits))
    return after


@jax.jit
def _each_its_own(groups: list[jax.Array], carries: list[Carry]) -> Carry:
    """Selects for each row the carry of its group."""

    def choose(axis: int, *leaves: jax.Array) -> jax.Array:
        chosen = leaves[0]
        for is_in, leaf in zip(groups[1:], leaves[1:], strict=True):
            shape = [1] * leaf.ndim
            shape[axis] = -1
            chosen = jnp.where(is_in.reshape(shape), leaf, chosen)
        return chosen

    caches = [carry.cache for carry in carries]
    first = jax.tree.map(functools.partial(choose, 0), *(carry.replace(cache=None) for carry in carries))
    return first.replace(cache=jax.tree.map(functools.partial(choose, 1), *caches))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _fresh_drafts(spec: Spec, weights: Weights, batch: int) -> Drafts | None:
    """Returns empty drafts, with room for the logits of drawn ones."""
    lengths = jnp.ones(batch, jnp.int32)
    rows = RowData(lengths, jnp.zeros((batch, 2), jnp.uint32), lengths)
    loop = spec.loop(weights, rows, Sampling(temperature=jnp.ones(batch)))
    return loop.start(jnp.zeros((batch, 1), jnp.int32), lengths, None).drafts


@jax.jit
def _moved_drafts(drafts: Drafts | None, rows: jax.Array) -> Drafts | None:
    return jax.tree.map(lambda x: x[rows], drafts)


@jax.jit
def _without_drafts(drafts: Drafts | None, slot: jax.Array) -> Drafts | None:
    return None if drafts is None else drafts.replace(drafted=drafts.drafted.at[slot].set(False))


@jax.jit
def _without_mask(logits: jax.Array, mask_token_id: int | None) -> jax.Array:
    """Returns logits [B, N, V] of the tokens that can be chosen. The mask token cannot, so it has no probability."""
    return logits if mask_token_id is None else logits.at[..., mask_token_id].set(-jnp.inf)


@functools.partial(jax.jit, static_argnums=3)
def _probabilities(tokens_BT: jax.Array, before_B: jax.Array, logits: jax.Array, candidates: int):
    """`most_probable` of the tokens that a pass appended, each under the logits that it was chosen from."""
    step = jnp.arange(logits.shape[1])
    index = jnp.minimum(before_B[:, None] + step, tokens_BT.shape[1] - 1)
    return most_probable(logits, jnp.take_along_axis(tokens_BT, index, axis=1), candidates)
