"""The options of decoding: one frozen record, its checks and its defaults.

A number is data to the compiled sampler, so another threshold does not recompile. A name, a switch, and whether a
number is set at all are static. None means off.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from flax import struct

from difflm_jax.diffusion.config import BLOCK_RULES, PROMPT_RULES
from difflm_jax.errors import UserError
from difflm_jax.sampling.confidence import CONFIDENCES
from difflm_jax.sampling.drafts import STRATEGIES
from difflm_jax.sampling.revise import REMASKINGS
from difflm_jax.sampling.schedule import DEADLINE, SCHEDULES

CACHES = ("auto", "none", "prefix", "dual")


def _number(description: str) -> Any:
    return struct.field(default=None, metadata={"help": description, "type": float})


def _static(default: Any, kind: type, description: str) -> Any:
    return struct.field(pytree_node=False, default=default, metadata={"help": description, "type": kind})


@struct.dataclass
class Sampling:
    """How masks are filled. Every field is an option of `generate` and `infill` and a flag of the command line."""

    algorithm: str | None = _static(
        None,
        str,
        f"Which masks come first: {', '.join(CONFIDENCES)}; or steady: all above a threshold, the leftmost; or "
        "speculative: the adapter drafts and its base verifies.",
    )
    temperature: float | None = _number("Above 0 draws tokens from softmax(logits / temperature); 0: the likeliest.")
    top_p: float | None = _number("Draws from the likeliest tokens whose probabilities add up to this.")
    top_k: int | None = _static(None, int, "Draws from this many of the likeliest tokens.")
    alg_temp: float | None = _number("Above 0 draws which masks are committed from softmax(confidence / alg_temp).")
    schedule: str | None = _static(None, str, f"Masks committed per pass: {', '.join(SCHEDULES)}.")
    leftmost: bool = _static(False, bool, "Every pass commits the leftmost mask too, as the causal base would.")
    threshold: float | None = _number("Commits every mask of at least this probability (Fast-dLLM).")
    factor: float | None = _number("Commits ranks r of probability at least 1 - factor / (r + 1) (Fast-dLLM).")
    entropy_bound: float | None = _number("Commits masks while their entropies add up to at most this (EB-Sampler).")
    remask: str | None = _static(None, str, f"Masks committed tokens again (ReMDM): {', '.join(REMASKINGS)}.")
    remask_eta: float | None = _number("How often: at most this for cap, a share of what is possible for rescale.")
    edit_threshold: float | None = _number("Replaces committed tokens of a block above this probability (LLaDA2.1).")
    edit_passes: int = _static(16, int, "At most so many passes of edit_threshold after a block is full.")
    cfg_scale: float | None = _number("Classifier-free guidance away from the answer to an unknown prompt.")
    repetition_penalty: float | None = _number("Divides the logits of tokens that occur already; 1: off.")
    eos_penalty: float | None = _number("Taken off the logits of end-of-sequence tokens; inf: never one.")
    eos_last: bool = _static(False, bool, "End-of-sequence tokens are committed only where nothing else is left.")
    stop_at_eos: bool = _static(True, bool, "Masks after a committed end-of-sequence token are left.")
    cache: str = _static("auto", str, f"Keys and values kept between passes: {', '.join(CACHES)}; auto is exact.")
    refresh_interval: int | None = _static(None, int, "Passes after which prefix and dual caches are made anew.")
    strategy: str | None = _static(None, str, f"How speculative decoding drafts: {', '.join(STRATEGIES)}.")
    draft_length: int | None = _static(None, int, "Drafts per pass; as many as the adapter was trained for.")
    lookup: bool = _static(True, bool, "Proposes what followed where the last tokens occurred before, else drafts.")
    verify: str | None = _static(None, str, "base: drafts by diffusion, and the text is that of the causal base.")
    draft_passes: int | None = _static(None, int, "Diffusion passes per draft of verify=base; 1.")

    @property
    def commits_by_rate(self) -> bool:
        """Whether each mask is revealed at random, whatever the model's confidence."""
        return self.algorithm == "origin"

    @property
    def revises(self) -> bool:
        """Whether committed tokens may change while their block is active."""
        return self.remask is not None or self.edit_threshold is not None

    @property
    def at_most_one_pass_per_mask(self) -> bool:
        """Whether passes beyond one per mask would have nothing to commit.

        False for a deadline, where blocks share passes, and for ReMDM, which remasks.
        """
        return self.schedule != DEADLINE and self.remask is None


# Names for several options at once; an explicit option overrides the preset's.
PRESETS: dict[str, dict[str, Any]] = {
    "steady": {"algorithm": "probability", "threshold": 0.9, "leftmost": True, "schedule": DEADLINE},
}
SPECULATIVE = "speculative"
LEFT_TO_RIGHT = "left_to_right"
ALGORITHMS = (*CONFIDENCES, *PRESETS, SPECULATIVE)
_OF_DRAFTING = ("strategy", "draft_length", "lookup")
_DRAWING = ("temperature", "top_p", "top_k", "eos_penalty", "stop_at_eos")
_WITH_DRAFTING = (*_OF_DRAFTING, *_DRAWING, "algorithm", "schedule")
_WITH_VERIFY = ("verify", "draft_length", "draft_passes", *_DRAWING)
VERIFIED_RULES = PROMPT_RULES  # the keys of a prompt do not depend on what follows it
# Options that override an adapter's preset; only the preset's algorithm is kept.
_INSTEAD_OF_PRESETS = {"algorithm", "schedule", "factor", "entropy_bound", "remask", "alg_temp", "eos_last"}

# The algorithms whose score each rule supports; the first is the default.
_OF_PROBABILITY = ("probability", "maskgit_plus")
_ALGORITHMS_OF = {
    "threshold": _OF_PROBABILITY,
    "factor": _OF_PROBABILITY,
    "entropy_bound": ("entropy",),
    "remask": ("origin",),
}

# (fields, what they must be, the test)
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("temperature", "cfg_scale", "entropy_bound", "alg_temp"), "a number of at least 0", lambda x: 0 <= x < math.inf),
    (("eos_penalty",), "a number of at least 0, or inf", lambda x: x >= 0),
    (("top_p", "threshold"), "in (0, 1]", lambda x: 0 < x <= 1),
    (("edit_threshold", "remask_eta"), "in [0, 1]", lambda x: 0 <= x <= 1),
    (("factor", "repetition_penalty"), "a number greater than 0", lambda x: 0 < x < math.inf),
    (
        ("top_k", "edit_passes", "refresh_interval", "draft_length", "draft_passes"),
        "a positive integer",
        lambda x: x > 0,
    ),
)
_CHOICES = {
    "algorithm": ALGORITHMS,
    "schedule": SCHEDULES,
    "remask": REMASKINGS,
    "cache": CACHES,
    "strategy": STRATEGIES,
    "verify": ("base",),
}
# Values that mean the same as leaving the option out.
_OFF = {
    "temperature": 0,
    "top_p": 1,
    "alg_temp": 0,
    "cfg_scale": 0,
    "repetition_penalty": 1,
    "eos_penalty": 0,
    "eos_last": False,
}


def sampling_options(attention: str, default_algorithm: str, options: Mapping[str, Any]) -> Sampling:
    """Checks `options`, alone and together, and adds the defaults for the rule `attention`. Raises `UserError`."""
    fields = {field.name: field for field in dataclasses.fields(Sampling)}
    for name in options:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, 1, 0.0)[0]
            raise UserError(f"{name}: unknown option (did you mean {nearest}?)")
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        given[name] = _converted(name, value, fields[name].metadata["type"])
    given = {name: value for name, value in given.items() if not (name in _OFF and value == _OFF[name])}
    if "verify" in given:
        return _verified(attention, given)
    if given.get("algorithm", default_algorithm) == SPECULATIVE:
        return _speculative(attention, given)
    for name in _OF_DRAFTING:
        if name in given:
            raise UserError(f"{name}={given[name]!r}: belongs to algorithm={SPECULATIVE!r}")
    if "draft_passes" in given:
        raise UserError(f"draft_passes={given['draft_passes']}: belongs to verify='base'")
    if attention == "causal" and default_algorithm == "origin":
        default_algorithm = "probability"
    default_algorithm, given = _expanded(attention, default_algorithm, given)
    if given.get("leftmost") is False:  # it has overridden a preset's
        del given["leftmost"]
    _check_together(given, attention)
    if "algorithm" not in given:
        ruled = [algorithms[0] for rule, algorithms in _ALGORITHMS_OF.items() if rule in given]
        given["algorithm"] = ruled[0] if ruled else default_algorithm
    given.setdefault("schedule", "even")
    return Sampling(**given)


# Options of a measured preset (`difflm tune`) that are arguments of `generate`, not fields of `Sampling`.
_OF_GENERATE = ("block_length", "tokens_per_pass")


def of_sampling(preset: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a measured preset that are fields of `Sampling`."""
    return {name: value for name, value in preset.items() if name not in _OF_GENERATE}


def left_of_preset(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a measured preset that explicit options leave in effect.

    Explicit options override the preset's. Another rule for what is committed discards the whole preset.
    """
    names = {name for name, value in given.items() if value is not None}
    return (
        {}
        if names & {*_INSTEAD_OF_PRESETS, *_OF_DRAFTING}
        else {name: x for name, x in preset.items() if name not in names}
    )


def _speculative(attention: str, given: Mapping[str, Any]) -> Sampling:
    """Checks the options of speculative decoding. Raises `UserError`."""
    if attention != "causal":
        raise UserError(
            f"algorithm={SPECULATIVE!r} needs an adapter that drafts (objective=draft), or causal=True and "
            f"strategy='lookup'; attention is {attention!r} here"
        )
    for name in given:
        if name not in _WITH_DRAFTING:
            raise UserError(f"{name}={given[name]!r}: has no meaning in speculative decoding, whose text is the base's")
    if given.get("strategy") == "lookup" and given.get("lookup") is False:
        raise UserError("lookup=False: strategy='lookup' proposes nothing else")
    return Sampling(**{"schedule": "even", **given, "algorithm": SPECULATIVE})


def _verified(attention: str, given: Mapping[str, Any]) -> Sampling:
    """Checks the options of diffusion drafts that the base verifies. Raises `UserError`."""
    if attention not in VERIFIED_RULES:
        reason = "its text is the base's already" if attention == "causal" else "the keys of its prompts change"
        rules = " or ".join(VERIFIED_RULES)
        raise UserError(f"verify={given['verify']!r}: needs attention {rules}; it is {attention!r} here: {reason}")
    for name in given:
        if name not in _WITH_VERIFY and (name, given[name]) != ("algorithm", SPECULATIVE):
            raise UserError(f"{name}={given[name]!r}: has no meaning with verify={given['verify']!r}")
    return Sampling(**{"schedule": "even", **given, "algorithm": SPECULATIVE})


def _expanded(attention: str, default_algorithm: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Expands presets. Returns (default algorithm, options)."""
    if given.get("algorithm") in PRESETS:
        preset = PRESETS[given.pop("algorithm")]
        return default_algorithm, {**preset, **given}
    if default_algorithm in PRESETS:
        preset = PRESETS[default_algorithm]
        if attention != "causal" and not _INSTEAD_OF_PRESETS & given.keys():
            given = {**preset, **given}
        return preset["algorithm"], given
    return default_algorithm, given


def check_algorithm(algorithm: str) -> None:
    """Raises `UserError` for an unknown algorithm."""
    _converted("algorithm", algorithm, str)


def _converted(name: str, value: Any, kind: type) -> Any:
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise UserError(f"{name}={value!r} is not one of {', '.join(_CHOICES[name])}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} must be True or False, not {value!r}")
        return value
    wording, holds = next((wording, holds) for names, wording, holds in _RANGES if name in names)
    try:
        number = kind(value)
        good = not isinstance(value, (bool, str)) and number == value and holds(number)
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise UserError(f"{name} must be {wording}, not {value!r}")
    return number


def _check_together(given: Mapping[str, Any], attention: str) -> None:
    """Raises `UserError` for options that contradict each other or would have no effect."""

    def refuse(name: str, reason: str) -> None:
        raise UserError(f"{name}={given[name]!r}: {reason}")

    rules = [rule for rule in _ALGORITHMS_OF if rule in given]
    if len(rules) > 1:
        raise UserError(f"{rules[0]} and {rules[1]} are two rules for what is committed: give one")
    algorithm = given.get("algorithm")
    for rule in rules:
        if algorithm not in (None, *_ALGORITHMS_OF[rule]):
            refuse("algorithm", f"{rule} needs {' or '.join(_ALGORITHMS_OF[rule])}")
    by_chance = algorithm in ("random", "origin") or "remask" in given
    variable = any(rule in given for rule in ("threshold", "factor", "entropy_bound"))
    if "schedule" in given and ((variable and given["schedule"] != DEADLINE) or (by_chance and algorithm != "random")):
        refuse("schedule", "what is committed follows another rule here, not a schedule: leave one of them out")
    if "alg_temp" in given and (variable or by_chance):
        refuse("alg_temp", "draws from the ranking of a fixed schedule; the rule that is given uses none")
    if "remask_eta" in given and given.get("remask") not in ("cap", "rescale"):
        refuse("remask_eta", "belongs to remask=cap and remask=rescale")
    if given.get("remask") in ("cap", "rescale") and "remask_eta" not in given:
        refuse("remask", "needs remask_eta")
    if "edit_threshold" in given and "remask" in given:
        refuse("edit_threshold", "does not go with remask: a token is replaced or masked again, not both")
    if "edit_passes" in given and "edit_threshold" not in given:
        refuse("edit_passes", "has no effect without edit_threshold")
    if algorithm == LEFT_TO_RIGHT:
        for name in ("alg_temp", "eos_last"):
            if name in given:
                refuse(name, "algorithm='left_to_right' commits masks from the left, whatever they hold")
    if "leftmost" in given and by_chance:
        refuse("leftmost", "which masks are committed is left to chance here")
    if "leftmost" in given and "eos_last" in given:
        refuse("leftmost", "contradicts eos_last where an end-of-sequence token is the leftmost: give one")
    cache = given.get("cache", "auto")
    if "refresh_interval" in given and cache not in ("prefix", "dual"):
        refuse("refresh_interval", "belongs to cache=prefix and cache=dual")
    if cache in ("prefix", "dual") and attention in (*BLOCK_RULES, "causal"):
        refuse("cache", f"the cache of {attention} attention is exact already: leave it at auto")
    if attention == "causal":
        if algorithm == "origin":
            refuse("algorithm", "causal attention decodes one token a pass from left to right")
        for name in (*rules, "schedule", "alg_temp", "edit_threshold", "eos_last", "leftmost"):
            if name in given:
                refuse(name, "causal attention decodes one token a pass from left to right")
