"""Answers to prompts that are tokens already: which way of decoding they take, and where each of them ends."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.sampling.batching import FillOptions, answer_plan, fill_answers
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.causal import PLAIN, continue_rows, drafting_of, is_plain
from difflm_jax.sampling.drafts import Drafting
from difflm_jax.sampling.options import SPECULATIVE, Sampling
from difflm_jax.sampling.text import Generation, cut_answer, stop_strings
from difflm_jax.sampling.watch import Watcher


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a generation besides the prompts and `Sampling`: the arguments of `LanguageModel.generate`."""

    max_new_tokens: int = 128
    steps: int = 128
    block_length: int | None = None
    seed: int = 0
    batch_size: int = 16
    stop: str | Sequence[str] = ()
    on_pass: Watcher | None = None


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model and its tokenizer, as what answers rows of tokens."""

    decoder: Decoder
    tokenizer: Any

    def to(self, rows: Sequence[np.ndarray], sampling: Sampling, request: Request) -> Generation:
        """One answer for each prompt. Raises `UserError`."""
        if sampling.algorithm == SPECULATIVE:
            drafting = drafting_of(self.decoder.diffusion, sampling, request.block_length, request.on_pass)
            return self._continued(rows, sampling, drafting, request)
        most, steps = request.max_new_tokens, request.steps
        plan = answer_plan(self.decoder.diffusion, most, steps, request.block_length, sampling)
        self.check_length(max((len(row) for row in rows), default=0) + plan.num_blocks * plan.block_length)
        if is_plain(self.decoder, sampling) and request.on_pass is None:
            return self._continued(rows, sampling, PLAIN, request)
        options = FillOptions(sampling, steps, request.seed, request.batch_size, request.on_pass)
        stops = self._stops(request)
        filled = fill_answers(self.decoder, rows, most, plan, options)
        texts, tokens = self._cut(filled.rows, *stops)
        return Generation(texts, tokens, filled.passes, filled.committed)

    def is_observed(self, sampling: Sampling) -> bool:
        """Whether a watcher may see the passes: not those of speculative decoding, of causal draws, or of a mesh."""
        draws = is_plain(self.decoder, sampling) and sampling.temperature is not None
        return not (draws or sampling.algorithm == SPECULATIVE or self.decoder.mesh)

    def cut(self, row: np.ndarray, request: Request) -> np.ndarray:
        """The tokens of an answer up to where it ends."""
        return self._cut([row], *self._stops(request))[1][0]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def check_length(self, length: int) -> None:
        """Raises `UserError` for more tokens than the model has positions for."""
        most = self.decoder.model.config.max_position_embeddings
        if length > most:
            raise UserError(f"{length} tokens are more than the model's max_position_embeddings={most}")

    def _continued(
        self, rows: Sequence[np.ndarray], sampling: Sampling, drafting: Drafting, request: Request
    ) -> Generation:
        """Answers that are the causal base's own text, decoded from left to right."""
        most, stops = request.max_new_tokens, self._stops(request)
        self.check_length(max((len(row) for row in rows), default=0) + most)
        found = continue_rows(self.decoder, rows, most, sampling, drafting, request.seed, request.batch_size)
        committed = np.array([len(row) for row in found.rows], np.int32)
        drafts = (found.verified, found.accepted) if drafting.num_nodes else ()
        texts, tokens = self._cut(found.rows, *stops)
        return Generation(texts, tokens, found.passes, committed, *drafts)

    def _stops(self, request: Request) -> tuple[list[str], list[int]]:
        return stop_strings(request.stop, self.tokenizer)

    def _cut(self, rows: Sequence[np.ndarray], stops: list[str], stop_ids: list[int]) -> tuple[list[str], list]:
        """(texts, tokens) of answers up to where they end."""
        ends = (*self.decoder.eos_token_ids, *stop_ids)
        answers = [cut_answer(row, ends, stops, self.decode) for row in rows]
        return [text for text, _ in answers], [tokens for _, tokens in answers]
