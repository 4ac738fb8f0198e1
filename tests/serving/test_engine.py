"""The engine against `lm.generate`, whose tokens it gives whatever else it is doing."""

import numpy as np
import pytest

import difflm_jax
from difflm_jax.sampling.options import sampling_options
from difflm_jax.serving.engine import Engine, EngineOptions
from difflm_jax.serving.requests import Busy, Finished, Request
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(model_dir):
    return difflm_jax.load(model_dir, attention="full", dtype="float32")


def sampling(lm, **options):
    return sampling_options(lm.attention, lm.algorithm, options)


def test_an_answer_is_that_of_generate(lm):
    prompt = lm.prompts.prompt("Hi")
    expected = lm.generate([prompt], max_new_tokens=12, steps=6)
    with Engine({"tiny": lm}) as engine:
        events = list(engine.submit(Request("tiny", prompt, sampling(lm), max_new_tokens=12, steps=6)))
    assert isinstance(events[-1], Finished)
    np.testing.assert_array_equal(events[-1].tokens, expected.tokens[0])
    assert events[-1].passes == expected.steps[0]
    for update in events[:-1]:
        np.testing.assert_array_equal(update.tokens[: len(events[-1].tokens)], events[-1].tokens[: len(update.tokens)])


def test_a_full_queue_refuses(lm):
    request = Request("tiny", lm.prompts.prompt("Hi"), sampling(lm), max_new_tokens=8, steps=8)
    with Engine({"tiny": lm}, EngineOptions(rows=1, queue=2)) as engine, pytest.raises(Busy):
        for _ in range(20):
            engine.submit(request)
