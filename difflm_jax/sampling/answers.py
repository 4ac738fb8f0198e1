"""Answers to tokenised prompts: selects the decoding loop, and cuts each answer at its end."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.sampling.batching import FillOptions, answer_plan, fill_answers
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.causal import PLAIN, continue_rows, drafting_of, is_plain
from difflm_jax.sampling.drafts import Drafting
from difflm_jax.sampling.grammar.canvas import AutomatonRow, CanvasRow, MatcherRow
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.grammar.vocabulary import Vocabulary
from difflm_jax.sampling.loop import Plan
from difflm_jax.sampling.options import LEFT_TO_RIGHT, SPECULATIVE, Sampling
from difflm_jax.sampling.text import Generation, cut_answer, is_stopped, stop_strings
from difflm_jax.sampling.watch import Host, Watcher


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `LanguageModel.generate` other than the prompts and the fields of `Sampling`."""

    max_new_tokens: int = 128
    steps: int = 128
    block_length: int | None = None
    seed: int = 0
    batch_size: int = 16
    stop: str | Sequence[str] = ()
    on_pass: Watcher | None = None
    grammar: Grammar | None = None


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers rows of tokens with a model and its tokenizer. `base` returns the decoder of its causal base."""

    decoder: Decoder
    tokenizer: Any
    base: Callable[[], Decoder] | None = None

    def to(self, rows: Sequence[np.ndarray], sampling: Sampling, request: Request) -> Generation:
        """Generates one answer for each prompt. Raises `UserError`."""
        if request.grammar is not None:
            _check_grammar(sampling)
        if sampling.algorithm == SPECULATIVE:
            drafting = drafting_of(self.decoder.diffusion, sampling, request.block_length)
            return self._continued(rows, sampling, drafting, request)
        most, steps = request.max_new_tokens, request.steps
        plan = answer_plan(self.decoder.diffusion, most, steps, request.block_length, sampling)
        self.check_length(max((len(row) for row in rows), default=0) + plan.num_blocks * plan.block_length)
        if is_plain(self.decoder, sampling) and request.on_pass is None:
            return self._continued(rows, sampling, PLAIN, request)
        host = Host(self._canvas_rows(rows, sampling, request, plan), request.on_pass)
        options = FillOptions(sampling, steps, request.seed, request.batch_size, None if host == Host() else host)
        stops = self._stops(request)
        filled = fill_answers(self.decoder, rows, most, plan, options)
        texts, tokens = self._cut(filled.rows, *stops)
        complete = self._complete(request, filled.rows)
        return Generation(texts, tokens, filled.passes, filled.committed, complete=complete)

    def is_observed(self, sampling: Sampling) -> bool:
        """Whether a watcher may see the passes. False for a causal base with a temperature, and on a mesh."""
        draws = is_plain(self.decoder, sampling) and sampling.temperature is not None
        return not (draws or self.decoder.mesh)

    def cut(self, row: np.ndarray, request: Request) -> np.ndarray:
        """Cuts the tokens of an answer at its end."""
        return self._cut([row], *self._stops(request))[1][0]

    def decode(self, tokens: np.ndarray) -> str:
        """Decodes tokens to text, without special tokens."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def check_length(self, length: int) -> None:
        """Raises `UserError` if `length` exceeds the positions of the model."""
        most = self.decoder.model.config.max_position_embeddings
        if length > most:
            raise UserError(f"{length} tokens are more than the model's max_position_embeddings={most}")

    def _continued(
        self, rows: Sequence[np.ndarray], sampling: Sampling, drafting: Drafting, request: Request
    ) -> Generation:
        """Generates answers that are the causal base's own text, decoded from left to right."""
        most, (stops, stop_ids) = request.max_new_tokens, self._stops(request)
        self.check_length(max((len(row) for row in rows), default=0) + most)
        decoder, drafter = self.decoder, None
        if sampling.verify:
            decoder, drafter = self.base(), decoder
        ended = (lambda row: is_stopped(row, stop_ids, stops, self.decode)) if stops else None
        matchers = self._matchers(request, len(rows)) if request.grammar else None
        options = FillOptions(
            sampling, seed=request.seed, batch_size=request.batch_size, host=Host(watch=request.on_pass)
        )
        found = continue_rows(decoder, rows, most, options, drafting, ended, drafter, matchers)
        committed = np.array([len(row) for row in found.rows], np.int32)
        drafts = (found.verified, found.accepted) if drafting.num_nodes else (None, None)
        texts, tokens = self._cut(found.rows, stops, stop_ids)
        return Generation(texts, tokens, found.passes, committed, *drafts, self._complete(request, found.rows))

    def _matchers(self, request: Request, count: int) -> list[Matcher]:
        """Returns one matcher for each of `count` rows."""
        return [request.grammar.matcher(self._vocabulary) for _ in range(count)]

    def _canvas_rows(
        self, rows: Sequence[np.ndarray], sampling: Sampling, request: Request, plan: Plan
    ) -> list[CanvasRow] | None:
        """Returns the grammar constraint of each row of a canvas; None without a grammar. Raises `UserError`."""
        if request.grammar is None:
            return None
        diffusion, most = self.decoder.diffusion, request.max_new_tokens
        if sampling.revises:
            raise UserError("grammar: committed tokens must stay, so not with remask or edit_threshold")
        offsets = [len(row) - diffusion.settled(len(row)) for row in rows]
        if request.grammar.is_regular:
            automaton = request.grammar.automaton(self._vocabulary)
            return [AutomatonRow(automaton, most, offset, diffusion.mask_token_id) for offset in offsets]
        if sampling.algorithm != LEFT_TO_RIGHT and plan.block_length > 1:
            raise UserError(
                f"algorithm={sampling.algorithm!r}: what a {request.grammar.kind} allows is known from the left only: "
                f"give algorithm={LEFT_TO_RIGHT!r} (a regex or a choice goes with any)"
            )
        matchers = self._matchers(request, len(rows))
        return [MatcherRow(matcher, most, at, self._vocabulary) for matcher, at in zip(matchers, offsets, strict=True)]

    def canvas_row(self, row: np.ndarray, sampling: Sampling, request: Any, plan: Plan) -> CanvasRow | None:
        """Returns the grammar constraint of the answer to `row`; None without a grammar. Raises `UserError`."""
        if request.grammar is None:
            return None
        _check_grammar(sampling)
        return self._canvas_rows([row], sampling, request, plan)[0]

    def _complete(self, request: Request, rows: Sequence[np.ndarray]) -> np.ndarray | None:
        """[rows] bool: whether each answer is complete under the grammar; None without one."""
        if request.grammar is None:
            return None
        complete = []
        for row, matcher in zip(rows, self._matchers(request, len(rows)), strict=True):
            ends = np.flatnonzero(np.isin(row, self.decoder.eos_token_ids))
            row = row[: ends[0] + 1] if len(ends) else row
            whole = matcher.accepts(row) == len(row)
            if whole:
                matcher.advance(row)
            complete.append(whole and matcher.is_accepting)
        return np.array(complete, bool)

    @property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer, self.decoder.model.config.vocab_size, self.decoder.eos_token_ids)

    def _stops(self, request: Request) -> tuple[list[str], list[int]]:
        return stop_strings(request.stop, self.tokenizer)

    def _cut(self, rows: Sequence[np.ndarray], stops: list[str], stop_ids: list[int]) -> tuple[list[str], list]:
        """Cuts answers at their ends. Returns (texts, tokens)."""
        ends = (*self.decoder.eos_token_ids, *stop_ids)
        answers = [cut_answer(row, ends, stops, self.decode) for row in rows]
        return [text for text, _ in answers], [tokens for _, tokens in answers]


def _check_grammar(sampling: Sampling) -> None:
    """Raises `UserError` for options that contradict a grammar."""
    if sampling.eos_penalty is not None:
        raise UserError(
            f"eos_penalty={sampling.eos_penalty}: a grammar says where an answer ends: leave one of them out"
        )
    if not sampling.stop_at_eos:
        raise UserError("stop_at_eos=False: a grammar ends answers by an end of sequence: leave one of them out")
