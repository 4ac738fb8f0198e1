"""The engine against `lm.generate`, whose tokens it gives whatever else it is doing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difflm_jax
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.sampling.options import sampling_options
from difflm_jax.serving.engine import Engine, EngineOptions
from difflm_jax.serving.requests import Busy, Finished, Request
from tests.tiny_checkpoint import save_tiny_model

PROMPTS = ["Hi", "A rather longer prompt than the first one, of several chunks.", "42?", "What is it? " * 4]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def adapter_of(lm, seed, rank=4, **config):
    config = LoraConfig(r=rank, lora_alpha=8, **config)
    lora = init_lora(jax.random.key(seed), lm.params, config, jnp.full(32, 0.2 - 0.1 * seed))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed + 1), x.shape), lora), config


@pytest.fixture(scope="module")
def base(model_dir):
    return difflm_jax.load(model_dir, causal=True, dtype="float32")


@pytest.fixture(scope="module")
def models(model_dir, base):
    """One model for each way of decoding, with a random adapter where it has one."""
    full = difflm_jax.load(model_dir, attention="full", dtype="float32")
    adapted = full.with_adapter(*adapter_of(full, 0))
    drafts = {"attention": "causal", "logit_shift": True, "gated": True, "noise": "uniform", "draft_length": 3}
    lora, config = adapter_of(full, 0)
    drafter = full.with_adapter({"layers": lora["layers"]}, config).with_diffusion(algorithm="speculative", **drafts)
    return {
        "causal": base,
        "full": adapted,
        "shifted": adapted.with_diffusion(logit_shift=True),
        "prefix": adapted.with_diffusion(attention="prefix", logit_shift=True),
        "block": adapted.with_diffusion(attention="block", block_length=4),
        "shifted block": adapted.with_diffusion(attention="block", block_length=4, logit_shift=True),
        "block_causal": adapted.with_diffusion(attention="block_causal", block_length=4),
        "speculative": drafter,
    }


def request(lm, name, prompt, max_new_tokens=12, steps=12, **options):
    given = {key: options.pop(key) for key in ("block_length", "seed", "copy", "stop", "logprobs") if key in options}
    sampling = sampling_options(lm.attention, lm.algorithm, options)
    tokens = lm.prompts.prompt(prompt)
    return Request(name, tokens, sampling, max_new_tokens=max_new_tokens, steps=steps, **given)


def generated(lm, request):
    """What `lm.generate` gives for a request."""
    sampling = {
        key: value
        for key, value in vars(request.sampling).items()
        if value is not None and value != type(request.sampling).__dataclass_fields__[key].default
    }
    if sampling["algorithm"] == "speculative" or lm.attention == "causal" or "threshold" in sampling:
        sampling.pop("schedule", None)
    given = {"steps": request.steps, "block_length": request.block_length, "seed": request.seed}
    return lm.generate(
        [request.tokens] * (request.copy + 1), request.max_new_tokens, stop=request.stop, **given, **sampling
    )


def assert_same(finished, expected, copy=0):
    assert finished.error is None
    np.testing.assert_array_equal(finished.tokens, expected.tokens[copy])
    assert finished.passes == expected.steps[copy]


OPTIONS = {
    "causal": [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "top_p": 0.9, "copy": 1}],
    "speculative": [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "top_p": 0.9, "copy": 1}],
    "full": [{"steps": 6}, {"temperature": 0.8, "seed": 3}, {"block_length": 4, "threshold": 0.2}, {"cfg_scale": 0.5}],
    "shifted": [{"steps": 6}, {"block_length": 4, "temperature": 0.7, "copy": 1}],
    "prefix": [{"steps": 6}, {"block_length": 6, "threshold": 0.2}, {"temperature": 0.8, "algorithm": "entropy"}],
    "block": [{"steps": 6}, {"threshold": 0.2}, {"temperature": 0.8, "seed": 3}, {"algorithm": "steady", "steps": 6}],
    "shifted block": [{"steps": 6}, {"threshold": 0.2}, {"temperature": 0.8}],
    "block_causal": [{"steps": 6}, {"threshold": 0.2}, {"temperature": 0.8}],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_full_batch_of_mixed_options_gives_what_each_request_gives_alone(models, name):
    lm = models[name]
    asked = [
        request(lm, name, prompt, **{"steps": 12, **options}) for options in OPTIONS[name] for prompt in PROMPTS[:2]
    ]
    with Engine(models, EngineOptions(rows=8, chunk=16)) as engine:
        together = [engine.submit(one) for one in asked]
        for one, ticket in zip(asked, together, strict=True):
            assert_same(ticket.result(60), generated(lm, one), one.copy)
        assert max(engine.stats()["batches"]) > 2


def test_updates_only_ever_add_to_what_is_final(models):
    lm = models["block"]
    with Engine(models) as engine:
        events = list(engine.submit(request(lm, "block", "Hi")))
    assert isinstance(events[-1], Finished)
    for before, after in itertools.pairwise(events):
        np.testing.assert_array_equal(before.tokens, after.tokens[: len(before.tokens)])


def test_a_full_queue_refuses(models):
    asked = request(models["full"], "full", "Hi")
    with Engine(models, EngineOptions(rows=1, queue=2)) as engine, pytest.raises(Busy):
        for _ in range(20):
            engine.submit(asked)
