"""Turns a parsed body into engine requests: tokens, checked options, and lengths within the server's limits."""

import dataclasses
import functools
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.batching import answer_plan
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.sampling.options import (
    LEFT_TO_RIGHT,
    SPECULATIVE,
    Sampling,
    left_of_preset,
    of_sampling,
    sampling_options,
)
from difflm_jax.serving.constraints import grammar_of
from difflm_jax.serving.options import ServeOptions
from difflm_jax.serving.prompts import canvas_tokens, chat_text, chat_tokens, prompt_tokens
from difflm_jax.serving.requests import Request
from difflm_jax.serving.schemas import BadRequestError, ChatRequest, CompletionRequest
from difflm_jax.serving.tools import TOOL_CALL

_SEEDS = 2**31
_MOST_DIGITS = 10  # of a token id; Python refuses to parse thousands
_OF_ALL = ("temperature", "top_p", "top_k", "repetition_penalty", "eos_penalty")  # options of every decoding loop


@dataclasses.dataclass(frozen=True)
class Asked:
    """The engine requests of one body, one per choice, and the data needed to build its response."""

    body: ChatRequest | CompletionRequest
    lm: LanguageModel
    requests: tuple[Request, ...]
    gaps: tuple[slice | None, ...]  # position of the answer in the canvas of an infilling; None: not an infilling
    echoes: tuple[str, ...]  # the text before each answer if the prompt is echoed, else ""

    @property
    def finds_calls(self) -> bool:
        return isinstance(self.body, ChatRequest) and bool(self.body.tools) and self.body.tool_choice != "none"

    @property
    def ends(self) -> tuple[str, ...]:
        """Texts that end the content of an answer: stop strings and, if calls are parsed, the start of a call."""
        return (*self.body.stops, TOOL_CALL) if self.finds_calls else self.body.stops


def ask_chat(body: ChatRequest, name: str, lm: LanguageModel, options: ServeOptions) -> Asked:
    """Builds the requests for the choices of a chat. Raises `BadRequestError`."""
    tools = None if body.tool_choice == "none" else body.tools
    text = chat_text(lm, body.messages, tools, body.chat_template_kwargs, options.template_seconds)
    candidates = (body.top_logprobs or 0) if body.logprobs else None
    asking = _Asking(body, name, lm, options, candidates, body.length)
    tokens = chat_tokens(lm, text)
    return asking.asked([asking.request(tokens, copy) for copy in range(asking.count(1))])


def ask_completion(body: CompletionRequest, name: str, lm: LanguageModel, options: ServeOptions) -> Asked:
    """Builds the requests for the choices of a completion, n per prompt, in order. Raises `BadRequestError`."""
    asking = _Asking(body, name, lm, options, body.logprobs, body.length)
    prompts = body.prompts
    if not prompts:
        raise BadRequestError("prompt: is an empty list", "prompt")
    n = asking.count(len(prompts)) // len(prompts)
    requests, gaps, echoes = [], [], []
    for prompt in prompts:
        if body.suffix is None:
            tokens, gap = prompt_tokens(lm, prompt), None
        else:
            length = asking.gap()
            tokens, start = canvas_tokens(lm, prompt, length, body.suffix)
            gap = slice(start, start + length)
        requests += [asking.request(tokens, copy, gap) for copy in range(n)]
        gaps += [gap] * n
        echo = prompt if isinstance(prompt, str) else lm.tokenizer.decode(list(prompt))
        echoes += [echo if body.echo else ""] * n
    return asking.asked(requests, gaps, echoes)


@dataclasses.dataclass(frozen=True)
class _Asking:
    """The data that all choices of a body share, and the construction of their requests."""

    body: ChatRequest | CompletionRequest
    name: str
    lm: LanguageModel
    options: ServeOptions
    candidates: int | None
    length: int | None

    def count(self, prompts: int) -> int:
        """Returns the number of answers requested. Raises `BadRequestError` above the server's limit."""
        count = (self.body.n or 1) * prompts
        if count > self.options.max_answers:
            raise BadRequestError(f"n: {count} answers; this server gives at most {self.options.max_answers}", "n")
        return count

    def gap(self) -> int:
        """Returns the number of masks in an infilling. Raises `BadRequestError` above the server's limit."""
        length = self.length or self.options.max_new_tokens
        if length > self.options.max_length:
            raise self._too_long(0, length)
        return length

    def request(self, tokens: np.ndarray, copy: int, gap: slice | None = None) -> Request:
        sampling = self._sampling()
        length = self._length(tokens, gap)
        diffusion = self.body.diffusion
        return Request(
            model=self.name,
            tokens=tokens,
            sampling=sampling,
            infill=gap is not None,
            max_new_tokens=length,
            steps=self._steps(sampling, length, gap),
            block_length=None if gap is not None else self._block_length(length),
            seed=self.seed,
            copy=copy,
            stop=self.body.stops,
            logit_bias=self._logit_bias(),
            drafts=diffusion.drafts,
            grammar=self.grammar,
            logprobs=self.candidates,
            time_limit=self.options.time_limit,
        )

    def asked(
        self, requests: Sequence[Request], gaps: Sequence[slice | None] = (), echoes: Sequence[str] = ()
    ) -> Asked:
        nothing = len(requests)
        return Asked(
            self.body, self.lm, tuple(requests), tuple(gaps) or (None,) * nothing, tuple(echoes) or ("",) * nothing
        )

    def _sampling(self) -> Sampling:
        try:
            return sampling_options(
                self.lm.attention, self.lm.algorithm, {**of_sampling(self._preset), **self._given_options}
            )
        except UserError as error:
            raise BadRequestError(f"diffusion: {error}", "diffusion") from error

    @functools.cached_property
    def _given_options(self) -> dict[str, Any]:
        """The sampling options of the server's flags, overridden by those of the body."""
        defaults = self.options.sampling
        if self._is_causal:  # the server's flags are meant for models that fill masks
            defaults = {name: value for name, value in defaults.items() if name in _OF_ALL}
        given = {**defaults, **self.body.sampling()}
        if self.lm.attention != "causal" and self.grammar is not None and not self.grammar.is_regular:
            given.setdefault("algorithm", LEFT_TO_RIGHT)  # as `lm.generate`: a parser knows only the left context
        return given

    @functools.cached_property
    def _preset(self) -> dict[str, Any]:
        """The preset of `difflm tune`, applied as in `generate`, without its cache."""
        preset = left_of_preset(self.lm.diffusion.preset_options, self._given_options)
        return {name: value for name, value in preset.items() if name != "cache"}

    def _block_length(self, length: int) -> int | None:
        asked = self.body.diffusion.block_length or self.options.block_length
        tuned = self._preset.get("block_length")
        return asked or (tuned if tuned and length % tuned == 0 else None)

    def _length(self, tokens: np.ndarray, gap: slice | None) -> int:
        """Returns the tokens of the answer. Raises `BadRequestError` if they do not fit with the prompt."""
        room = self._most - (0 if gap else len(tokens))
        block = self.lm.diffusion.decoding_block or 1
        if gap is not None:
            length, needed = gap.stop - gap.start, len(tokens)
        else:
            length = self.length or max(min(self.options.max_new_tokens, room // block * block), 1)
            needed = -(-length // block) * block
        if needed > room:
            raise self._too_long(len(tokens) - length if gap else len(tokens), length)
        return length

    @functools.cached_property
    def seed(self) -> int:
        """The seed of all choices. They still draw different noise, because their `copy` differs."""
        given = self.body.seed
        return secrets.randbelow(_SEEDS) if given is None else given % _SEEDS

    @functools.cached_property
    def grammar(self) -> Grammar | None:
        """The grammar that each answer must match; None: no constraint."""
        return grammar_of(self.body)

    @property
    def _is_causal(self) -> bool:
        return self.lm.attention == "causal" and not self.lm.diffusion.gated

    @property
    def _most(self) -> int:
        return min(self.options.max_length, self.lm.config.max_position_embeddings)

    def _too_long(self, prompt: int, length: int) -> BadRequestError:
        prompts = "messages" if isinstance(self.body, ChatRequest) else "prompt"
        field = "max_tokens" if prompt < self._most else prompts
        return BadRequestError(
            f"{field}: {prompt} tokens of the prompt and {length} of the answer are more than the {self._most} that "
            "this server takes together",
            field,
            "context_length_exceeded",
        )

    def _steps(self, sampling: Sampling, length: int, gap: slice | None) -> int:
        """Returns the budget of forward passes; by default one per token. Raises `BadRequestError`."""
        diffusion, defaults = self.body.diffusion, self.options
        block_length = None if gap else self._block_length(length)
        block = block_length or self.lm.diffusion.decoding_block or 1
        steps = diffusion.steps or (not self._is_causal and defaults.steps) or -(-length // block) * block
        if "tokens_per_pass" in self._preset and not (gap or diffusion.steps or defaults.steps):
            tuned = -(-length // self._preset["tokens_per_pass"])
            steps = max(tuned, self.lm.diffusion.fewest_passes(length, block_length))
        if gap is None and sampling.algorithm != SPECULATIVE:
            try:
                answer_plan(self.lm.diffusion, length, steps, block_length, sampling)
            except UserError as error:
                raise BadRequestError(f"diffusion: {error}", "diffusion") from error
        if gap is not None and self.lm.diffusion.gated:
            raise BadRequestError("suffix: this model drafts the next tokens of a text; it fills no gaps", "suffix")
        if gap is not None and (diffusion.block_length or self.body.stops):
            what = "stop" if self.body.stops else "diffusion.block_length"
            raise BadRequestError(f"{what}: has no meaning for an infilling, which fills every mask", what)
        return steps

    def _logit_bias(self) -> tuple[tuple[int, float], ...]:
        biases = []
        for token, bias in (self.body.logit_bias or {}).items():
            is_number = token.isascii() and token.isdigit() and len(token) <= _MOST_DIGITS
            if not is_number or int(token) >= self.lm.config.vocab_size:
                raise BadRequestError(
                    f"logit_bias: {token[:20]!r} is not a token below {self.lm.config.vocab_size}", "logit_bias"
                )
            biases.append((int(token), bias))
        return tuple(sorted(biases))
