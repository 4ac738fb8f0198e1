"""A model class for lm-evaluation-harness (`pip install -e '.[lm-eval]'`), to score a converted model on its tasks.

    python -m difflm_jax.harness run --model difflm_jax --model_args run=runs/quickstart,samples=32 --tasks arc_easy

runs lm-eval's own command line with this model registered. From Python:

    lm_eval.simple_evaluate(DiffusionHarness(difflm_jax.load(...)), tasks=[...])

Log-likelihoods are LLaDA's Monte-Carlo bound, or exact ones of the base with `causal=True`. Answers are decoded by
filling masks.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from difflm_jax.errors import UserError, exit_with_errors
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import load_model, spec_of_names

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    missing = UserError(f"lm-evaluation-harness is not installed ({error}): pip install -e '.[lm-eval]'")
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise missing from error

_TRUE = ("true", "1", "yes")


_LM_EVAL = ("device", "max_batch_size")  # arguments of its other models, ignored here


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How texts are scored and requests answered.

    batch_size: rows at a time.
    max_length: longest row, in tokens.
    samples: masked copies per row for the bound of its log-likelihood.
    max_gen_toks: the answer's canvas if a task sets none.
    tokens_per_pass: tokens committed per forward pass, so that `steps` follows the canvas.
    check_greedy: whether to check if greedy decoding gives the scored text. It costs one pass per token. Tasks that
      read `acc` of a single continuation need it.
    """

    batch_size: int = 16
    max_length: int = 4096
    samples: int = 128
    seed: int = 0
    max_gen_toks: int = 128
    tokens_per_pass: float = 1.0
    check_greedy: bool = True

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Scoring":
        """Parses arguments of lm-eval, which may be text. Raises `UserError`."""
        values = {}
        for field in dataclasses.fields(cls):
            if (value := arguments.get(field.name)) is None:
                continue
            try:
                values[field.name] = _flag(value) if field.type is bool else field.type(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"{field.name}={value!r}: must be a number") from error
        scoring = cls(**values)
        if scoring.tokens_per_pass <= 0 or scoring.samples < 1:
            raise UserError(
                f"tokens_per_pass={scoring.tokens_per_pass:g}, samples={scoring.samples}: must be greater than 0"
            )
        return scoring


def _taken(arguments: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Removes `names` from `arguments` and returns the removed items."""
    return {name: arguments.pop(name) for name in [*names] if name in arguments}


@register_model("difflm_jax")
class DiffusionHarness(TemplateLM):
    """A converted model with the interface of lm-eval: `lm`, or the one that `model` (with `adapter`) or `run` names.

    The arguments are those of `loading.spec_of_names`, the fields of `Scoring`, and options of
    `LanguageModel.generate`. `causal` selects the base.
    """

    def __init__(self, lm: LanguageModel | None = None, causal: bool | str = False, **arguments: Any):
        super().__init__()
        named = _taken(arguments, inspect.signature(spec_of_names).parameters)
        self._scoring = Scoring.of(_taken(arguments, Scoring.__dataclass_fields__))
        _taken(arguments, _LM_EVAL)
        if lm is None:
            lm = load_model(spec_of_names(**named), with_base=_flag(causal))
        self._lm = lm.base() if _flag(causal) else lm
        self.max_length = min(self._scoring.max_length, self._lm.config.max_position_embeddings)
        self._options = arguments
        self.tokenizer = self._lm.tokenizer

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "DiffusionHarness":
        """Builds the model for lm-eval. `--model_args` takes precedence over lm-eval's own flags and their defaults."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "DiffusionHarness":
        """Builds the model for lm-eval from arguments as text."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._lm.source.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation as text. Without a generation prompt the last turn stays open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenises a text. By default the ids start with the tokenizer's BOS exactly once, as in lm-eval's `hf`.

        Tokens that the tokenizer adds at the end are removed; they would end the answer within the prompt.
        """
        if add_special_tokens:
            return self.tokenizer(string, verbose=False)["input_ids"]
        tokens = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        is_begun = tokens[: len(self._beginning)] == self._beginning  # by a chat template that has BOS
        return tokens if add_special_tokens is False or is_begun else [*self._beginning, *tokens]

    @functools.cached_property
    def _beginning(self) -> list[int]:
        """The tokens that the tokenizer adds before a text."""
        plain, whole = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns log-likelihoods of whole texts, in windows of `max_length` that overlap by a token."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 1, 1
            )
            found = [utils.make_disjoint_window(window) for window in rolling]
            windows += found
            owners += [index] * len(found)
        values = self._values([window for window, _ in windows], [part for _, part in windows])
        totals = [float(values[np.equal(owners, index)].sum()) for index in range(len(requests))]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether decoding gives it) per continuation. Contexts are cut from the left."""
        rows = []
        for (context, continuation), before, after in requests:
            if not after:
                raise UserError(f"lm-eval asks for the likelihood of nothing: {context[-40:]!r} then {continuation!r}")
            if len(after) >= self.max_length:
                raise UserError(f"a continuation of {len(after)} tokens is longer than max_length={self.max_length}")
            rows.append((before[len(after) - self.max_length :], after))
        values = self._values([before for before, _ in rows], [after for _, after in rows])
        greedy = self._greedy(rows) if self._scoring.check_greedy else [False] * len(rows)
        found = [(float(value), bool(same)) for value, same in zip(values, greedy, strict=True)]
        for (key, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates answers up to the first of a request's `until` texts. Requests with equal options are batched."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=lambda item: item[0])), []).append(index)
        for members in groups.values():
            kwargs = normalize_gen_kwargs(requests[members[0]].args[1], self._scoring.max_gen_toks)
            kwargs.pop("do_sample")
            until, length = [text for text in kwargs.pop("until") if text], kwargs.pop("max_gen_toks")
            if length >= self.max_length:
                raise UserError(f"max_gen_toks={length} leaves no room for a prompt in max_length={self.max_length}")
            fewest = self._lm.diffusion.fewest_passes(length, self._options.get("block_length"))
            steps = max(fewest, round(length / self._scoring.tokens_per_pass))
            prompts = [self._prompt(requests[i].args[0], self.max_length - length) for i in members]
            options = {"seed": self._scoring.seed, "batch_size": self._scoring.batch_size, **self._options, **kwargs}
            texts = self._lm.generate(prompts, length, steps, stop=until, **options).texts
            for index, text in zip(members, texts, strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _prompt(self, text: str, longest: int) -> list[int]:
        return (self.tok_encode(text) or [self.prefix_token_id])[-longest:]

    def _values(self, prompts: list[list[int]], answers: list[list[int]]) -> np.ndarray:
        if not prompts:
            return np.zeros(0)
        return self._lm.log_likelihood(
            prompts, answers, self._scoring.samples, self._scoring.seed, self._scoring.batch_size
        ).values

    def _greedy(self, rows: list[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether filling one mask per token of a continuation, most confident first, gives that continuation."""
        mask = self._lm.mask_token_id
        canvases = [[*before, *[mask] * len(after)] for before, after in rows]
        steps = max((len(after) for _, after in rows), default=1)
        algorithm = None if self._lm.attention == "causal" else "probability"
        filled = self._lm.infill(canvases, steps, algorithm=algorithm, batch_size=self._scoring.batch_size).tokens
        return [tokens[len(before) :].tolist() == after for tokens, (before, after) in zip(filled, rows, strict=True)]


def _flag(value: bool | str) -> bool:
    return value if isinstance(value, bool) else str(value).lower() in _TRUE


def command(argv: Sequence[str]) -> int:
    """Runs lm-eval's own command line on `argv` and returns the exit status."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = list(argv)
    return exit_with_errors(cli_evaluate)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
