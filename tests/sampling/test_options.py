"""Decoding options: how they are resolved, and one clear error line for invalid ones."""

from types import SimpleNamespace

import jax
import pytest

from difflm_jax import UserError
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.evaluate import _check_decoding
from difflm_jax.sampling.options import Sampling, sampling_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 0.9}, r"treshold: unknown option \(did you mean threshold\?\)"),
        ({"temperature": -1}, "temperature must be a number of at least 0"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"top_k": 2.5}, "top_k must be a positive integer"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\]"),
        ({"factor": 0}, "factor must be a number greater than 0"),
        ({"entropy_bound": -0.1}, "entropy_bound must be"),
        ({"algorithm": "best"}, "algorithm='best' is not one of confidence, probability"),
        ({"schedule": "cosine"}, "schedule='cosine' is not one of even, dream, dllm"),
        ({"cache": "big"}, "cache='big' is not one of auto, none, prefix, dual"),
        ({"remask": "loop"}, "remask='loop' is not one of cap, rescale, conf"),
        ({"stop_at_eos": 1}, "stop_at_eos must be True or False"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor are two rules"),
        ({"threshold": 0.9, "algorithm": "confidence"}, "threshold needs probability or maskgit_plus"),
        ({"entropy_bound": 0.5, "algorithm": "probability"}, "entropy_bound needs entropy"),
        ({"threshold": 0.9, "schedule": "dream"}, "what is committed follows another rule"),
        ({"algorithm": "origin", "schedule": "even"}, "what is committed follows another rule"),
        ({"threshold": 0.9, "alg_temp": 0.1}, "alg_temp=0.1: draws from the ranking"),
        ({"algorithm": "random", "alg_temp": 0.1}, "alg_temp=0.1: draws from the ranking"),
        ({"remask": "cap"}, "needs remask_eta"),
        ({"remask_eta": 0.1}, "belongs to remask=cap"),
        ({"remask": "conf", "remask_eta": 0.1}, "belongs to remask=cap"),
        ({"remask": "conf", "algorithm": "probability"}, "remask needs origin"),
        ({"remask": "conf", "edit_threshold": 0.9}, "does not go with remask"),
        ({"edit_passes": 4}, "has no effect without edit_threshold"),
        ({"refresh_interval": 4}, "belongs to cache=prefix and cache=dual"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        sampling_options("full", "confidence", options)


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_an_exact_cache_is_not_replaced_by_an_approximate_one(attention):
    with pytest.raises(UserError, match="is exact already"):
        sampling_options(attention, "confidence", {"cache": "dual"})


@pytest.mark.parametrize("options", [{"threshold": 0.9}, {"schedule": "dream"}, {"remask": "conf"}, {"eos_last": True}])
def test_causal_decoding_has_no_order_to_choose(options):
    with pytest.raises(UserError, match="causal attention decodes one token a pass"):
        sampling_options("causal", "confidence", options)


def test_what_is_left_out_follows_from_the_rest():
    assert sampling_options("full", "entropy", {}).algorithm == "entropy"
    assert sampling_options("full", "entropy", {"threshold": 0.9}).algorithm == "probability"
    assert sampling_options("full", "confidence", {"entropy_bound": 0.1}).algorithm == "entropy"
    assert sampling_options("full", "confidence", {"remask": "conf"}).algorithm == "origin"
    assert (
        sampling_options("full", "confidence", {"factor": 1, "algorithm": "maskgit_plus"}).algorithm == "maskgit_plus"
    )


def test_values_that_change_nothing_are_off():
    neutral = {
        "temperature": 0.0,
        "top_p": 1.0,
        "alg_temp": 0,
        "cfg_scale": 0,
        "repetition_penalty": 1,
        "eos_penalty": 0,
    }
    assert sampling_options("full", "confidence", neutral) == sampling_options("full", "confidence", {})


def test_numbers_are_data_and_names_are_not():
    """Another threshold is the same pytree with another leaf; turning it on changes the tree."""

    def structure(options):
        return jax.tree.structure(sampling_options("full", "probability", options))

    assert structure({"threshold": 0.9}) == structure({"threshold": 0.5})
    assert structure({"threshold": 0.9}) != structure({})
    assert structure({"algorithm": "random"}) != structure({})
    assert jax.tree.leaves(sampling_options("full", "probability", {"threshold": 0.9, "temperature": 0.5})) == [
        0.5,
        0.9,
    ]
    assert isinstance(sampling_options("full", "confidence", {}), Sampling)


STEADY = {"algorithm": "probability", "threshold": 0.9, "leftmost": True, "schedule": "deadline"}


@pytest.mark.parametrize(
    ("default", "options", "expected"),
    [
        ("confidence", {"algorithm": "steady"}, STEADY),
        ("steady", {}, STEADY),
        ("steady", {"threshold": 0.7}, {**STEADY, "threshold": 0.7}),
        ("confidence", {"algorithm": "steady", "leftmost": False}, {**STEADY, "leftmost": False}),
        ("steady", {"factor": 1.0}, {"algorithm": "probability", "factor": 1.0}),
        ("steady", {"algorithm": "entropy"}, {"algorithm": "entropy"}),
        ("steady", {"entropy_bound": 0.1}, {"algorithm": "entropy", "entropy_bound": 0.1}),
        ("steady", {"temperature": 0.5}, {**STEADY, "temperature": 0.5}),
    ],
    ids=str,
)
def test_a_preset_stands_for_its_options_and_gives_way_to_those_that_are_named(default, options, expected):
    assert sampling_options("full", default, options) == Sampling(**{"schedule": "even", **expected})


def test_the_preset_of_an_adapter_does_not_reach_its_causal_base():
    assert sampling_options("causal", "steady", {}) == Sampling(algorithm="probability", schedule="even")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leftmost": True, "algorithm": "random"}, "left to chance"),
        ({"leftmost": True, "eos_last": True}, "contradicts eos_last"),
        ({"algorithm": "steady", "schedule": "dream"}, "what is committed follows another rule"),
    ],
    ids=str,
)
def test_leftmost_and_presets_are_refused_where_they_contradict(options, message):
    with pytest.raises(UserError, match=message):
        sampling_options("full", "confidence", options)


def test_a_switch_that_is_off_says_nothing():
    assert sampling_options("full", "confidence", {"algorithm": "random", "leftmost": False}).algorithm == "random"
    assert not sampling_options("causal", "confidence", {"eos_last": False}).eos_last
    options = sampling_options("full", "confidence", {"algorithm": "steady", "leftmost": False, "eos_last": True})
    assert options.eos_last and not options.leftmost and options.threshold == 0.9


def test_left_to_right_is_not_left_to_chance():
    assert sampling_options("causal", "origin", {}).algorithm == "probability"
    with pytest.raises(UserError, match="one token a pass"):
        sampling_options("causal", "confidence", {"algorithm": "origin"})


def test_too_many_tokens_per_pass_for_the_blocks_are_told_by_the_flags_that_were_given():
    """Regression: the message named a number of `steps` that was not given."""
    lm = SimpleNamespace(diffusion=DiffusionConfig("prefix"), attention="prefix", algorithm="confidence")
    given = SimpleNamespace(data="rows.jsonl", max_new_tokens=16, block_length=4)
    _check_decoding(lm, given, [1, 3, 4], {})  # 3 tokens per pass are 6 passes for 4 blocks
    with pytest.raises(UserError, match="--tokens_per_pass=8: an answer of --max_new_tokens=16 is filled in 4 blocks"):
        _check_decoding(lm, given, [8], {})
