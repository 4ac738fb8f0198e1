"""A row of masks that diffusion fills: its layout, as in `lm.generate` and `lm.infill`, and its progress."""

import dataclasses

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.batching import (
    FillOptions,
    answer_plan,
    check_positive,
    check_seed,
    masks_of_blocks,
    steps_bucket,
    steps_of_blocks,
    width_bucket,
)
from difflm_jax.sampling.loop import Plan
from difflm_jax.sampling.schedule import quotas
from difflm_jax.serving.requests import Draft, Request, TokenProbability
from difflm_jax.serving.work import Row, key_of

WHOLE, PROMPT, BLOCKS = "whole", "prompt", "blocks"  # the columns that a pass runs over; see `filled`


class CanvasRow(Row):
    """A prompt with settled columns, and the rest with its masks, in blocks. Raises `UserError`.

    All blocks of a table have one width. A row with shorter blocks leaves the last columns of each block empty.
    """

    def __init__(self, lm: LanguageModel, request: Request):
        self.sampling, diffusion = request.sampling, lm.diffusion
        check_seed(request.seed)
        if request.grammar is not None and request.infill:
            raise UserError("grammar: belongs to answers, not to an infilling")
        if self.sampling.cache in ("prefix", "dual"):
            raise UserError(f"cache={self.sampling.cache!r}: the server keeps exact caches only: leave it at auto")
        prefix, rest, plan = _infilled(lm, request) if request.infill else _answered(lm, request)
        self._mask, self._given = lm.mask_token_id, len(request.tokens) - len(prefix)
        self.prefix, self._rest, self._is_infill = prefix, rest, request.infill
        self._most = len(rest) if request.infill else request.max_new_tokens
        lm.answers.check_length(len(prefix) + len(rest))
        self.grammar = lm.answers.canvas_row(request.tokens, self.sampling, request, plan)
        self.key = key_of(request, np.concatenate([prefix, rest]))
        masks_J = masks_of_blocks(rest == self._mask, plan)
        self.steps = steps_of_blocks(masks_J[None], plan, FillOptions(self.sampling, request.steps))
        self._plan = dataclasses.replace(plan, steps_per_block=steps_bucket(self.steps.max(), plan))
        self.quotas = quotas(self.sampling.schedule, masks_J[None], self.steps, self._plan.steps_per_block)[0]
        self.steps = self.steps[0]
        self.width = self._width(diffusion)
        self.mode = self._mode(diffusion)
        self._lay_out()
        self.done = not (rest == self._mask).any()

    @property
    def num_blocks(self) -> int:
        return self._plan.num_blocks

    @property
    def block_length(self) -> int:
        """The length of the row's own blocks; at most the width of the table's."""
        return self._plan.block_length

    @property
    def is_guided(self) -> bool:
        return self.sampling.cfg_scale is not None

    @property
    def needed(self) -> int:
        """Number of prompt columns that passes read from the cache."""
        return 0 if self.mode == WHOLE else len(self.prefix) - self.shift

    def final(self) -> np.ndarray:
        tokens = self._own(self.tokens)
        open_ = tokens == self._mask
        if self.sampling.revises:
            open_[self.block * self._plan.block_length :] = True
        end = int(open_.argmax()) if open_.any() else len(open_)
        return self._answer(tokens, end)

    def answer(self) -> np.ndarray:
        return self._answer(self._own(self.tokens), len(self._rest))

    def whole_answer(self) -> np.ndarray:
        """Returns every place of the answer to a prompt, with masks where nothing is committed."""
        return self._own(self.tokens)[self._given : self._given + self._most]

    def draft(self) -> Draft:
        tokens, guess = self._own(self.tokens), self._own(self.guess)
        committed = tokens != self._mask
        guessed = ~committed & (guess >= 0)
        at = slice(None) if self._is_infill else slice(self._given, self._given + self._most)
        drawn = np.where(committed, tokens, np.where(guessed, guess, self._mask))
        parts = [drawn[at], committed[at], guessed[at]]
        if self._is_infill:
            given = np.ones(len(self.prefix), bool)
            parts = [np.concatenate(pair) for pair in zip((self.prefix, given, ~given), parts, strict=True)]
        return Draft(*parts)

    def _answer(self, tokens: np.ndarray, end: int) -> np.ndarray:
        """Returns the answer's tokens among the first `end` of the rest; for an infilling, the canvas up to there."""
        if self._is_infill:
            return np.concatenate([self.prefix, tokens[:end]])
        return tokens[self._given : min(end, self._given + self._most)]

    def _width(self, diffusion) -> int:
        """Returns the width of a block in a table, rounded up to a few values unless draws depend on it."""
        block = self._plan.block_length
        draws = self.sampling.temperature is not None or self.sampling.alg_temp is not None
        looks_back = diffusion.shift and self.num_blocks > 1  # reads the column before a block; it must not be empty
        return block if draws or looks_back or diffusion.decoding_block else width_bucket(block)

    def _mode(self, diffusion) -> str:
        self.shift = diffusion.shift
        if self.sampling.cfg_scale is not None or self.sampling.cache == "none" or len(self.prefix) <= self.shift:
            return WHOLE
        return {"none": WHOLE, "prompt": PROMPT, "blocks": BLOCKS}[diffusion.exact_cache]

    def _lay_out(self) -> None:
        """Creates the arrays of the row, over the columns of its blocks."""
        block, columns = self._plan.block_length, self.num_blocks * self.width
        place = np.arange(len(self._rest))
        self._at = place // block * self.width + place % block
        self.tokens = np.full(columns, self._mask, np.int32)  # unused columns are masks that are never filled
        self.tokens[self._at] = self._rest
        self.valid = np.zeros(columns, bool)
        self.valid[self._at] = True
        self.fillable = self.valid & (self.tokens == self._mask)
        self.confidence = np.zeros(columns, np.float32)
        self.guess = np.full(columns, -1, np.int32)
        self.revisions = self.block = self.step = 0
        self.block_done = False
        self.written = self.needed
        self.probabilities: dict[int, TokenProbability] = {}  # of committed tokens, by column

    def _own(self, columns: np.ndarray) -> np.ndarray:
        """Selects the entries of the rest's tokens from an array over columns."""
        return columns[self._at]

    def all_probabilities(self) -> tuple[TokenProbability, ...]:
        """Returns the known probabilities of the tokens in `final` and `answer`; given tokens have probability 1."""
        given = self.prefix.tolist() if self._is_infill else []
        found = [TokenProbability(token, 0.0) for token in given]
        columns = self._at if self._is_infill else self._at[self._given : self._given + self._most]
        for column in columns.tolist():
            if not self.fillable[column]:
                found.append(TokenProbability(int(self.tokens[column]), 0.0))
            elif column in self.probabilities:
                found.append(self.probabilities[column])
        return tuple(found)


def _answered(lm: LanguageModel, request: Request) -> tuple[np.ndarray, np.ndarray, Plan]:
    """Returns (settled prompt, the rest, plan) of an answer, as in `fill_answers`."""
    diffusion, prompt = lm.diffusion, np.asarray(request.tokens, np.int32)
    most = request.max_new_tokens
    plan = answer_plan(diffusion, most, request.steps, request.block_length, request.sampling)
    whole = most if diffusion.blocks_include_prompt else plan.num_blocks * plan.block_length
    cut = diffusion.settled(len(prompt))
    rest = np.concatenate([prompt[cut:], np.full(whole, diffusion.mask_token_id, np.int32)])
    return prompt[:cut], rest, plan


def _infilled(lm: LanguageModel, request: Request) -> tuple[np.ndarray, np.ndarray, Plan]:
    """Returns (settled prompt, the rest, plan) of an infilling, as in `fill_masks`."""
    check_positive("steps", request.steps)
    diffusion, row = lm.diffusion, np.asarray(request.tokens, np.int32)
    if diffusion.gated:
        raise UserError("infill: this adapter drafts the next tokens of a text; it fills no gaps")
    at = np.flatnonzero(row == diffusion.mask_token_id)
    if diffusion.shift and len(at) and at[0] == 0:
        raise UserError("infill: with the logit shift nothing predicts the first token: it must not be a mask")
    if diffusion.attention == "causal" and request.steps < len(at):
        raise UserError("infill: causal attention fills one mask a pass (steps >= number of masks)")
    cut = diffusion.settled(int(at[0]) if len(at) else len(row))
    width = width_bucket(max(len(row) - cut, 1))
    block = diffusion.decoding_block or width
    return row[:cut], row[cut:], Plan(0, -(-width // block), block, request.steps)
