"""Tests shapes by name against the published parameter counts of the models."""

import math

import pytest

from difflm_jax.models.flops import parameters
from difflm_jax.models.weights import table
from difflm_jax.planning.models import _SHAPES, known_shape

# In millions, from the model cards at the hub ("Model size" of the safetensors files; tied embeddings counted once).
PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596.0, "Qwen/Qwen3-1.7B": 1720.6, "Qwen/Qwen3-4B-Base": 4022.5,
    "Qwen/Qwen3-4B-Instruct-2507": 4022.5, "Qwen/Qwen3-4B-Thinking-2507": 4022.5, "Qwen/Qwen3-8B": 8190.7,
    "Qwen/Qwen3-14B": 14768.3, "Qwen/Qwen3-32B": 32762.1, "Qwen/Qwen3-30B-A3B": 30532.1,
    "Qwen/Qwen3-235B-A22B": 235093.6, "Qwen/Qwen2.5-0.5B-Instruct": 494.0,
    "Qwen/Qwen2.5-1.5B-Instruct": 1543.7, "Qwen/Qwen2.5-3B": 3085.9, "Qwen/Qwen2.5-7B-Instruct": 7615.6,
    "Qwen/Qwen2.5-14B": 14770.0, "Qwen/Qwen2.5-32B": 32763.9, "meta-llama/Llama-3.2-1B-Instruct": 1235.8,
    "meta-llama/Llama-3.2-3B": 3212.7, "meta-llama/Llama-3.1-8B-Instruct": 8030.3, "meta-llama/Llama-3.1-70B": 70553.7,
    "meta-llama/Llama-3.3-70B-Instruct": 70553.7, "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5,
    "HuggingFaceTB/SmolLM2-360M": 361.8, "HuggingFaceTB/SmolLM2-1.7B": 1711.4, "mistralai/Mistral-7B-v0.3": 7248.0,
    "mistralai/Mistral-7B-Instruct-v0.3": 7248.0, "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1100.0,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_common_model_needs_no_network(name):
    config = known_shape(name)
    found = sum(math.prod(row.stack + row.shape) for row in table(config))
    assert found / 1e6 == pytest.approx(PUBLISHED[name], rel=3e-4)


@pytest.mark.parametrize(("name", "active"), [("Qwen/Qwen3-30B-A3B", 3.3), ("Qwen/Qwen3-235B-A22B", 22)])
def test_a_token_passes_through_as_many_parameters_as_the_name_says(name, active):
    total, found = parameters(known_shape(name))
    assert total / 1e6 == pytest.approx(PUBLISHED[name], rel=3e-4)
    assert found / 1e9 == pytest.approx(active, rel=0.02)


def test_every_shape_is_compared():
    assert len(PUBLISHED) >= len(_SHAPES)
    assert known_shape("qwen3-4b-instruct-2507").max_position_embeddings == 262144
    assert known_shape("SmolLM2-135M") == known_shape("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("name", ["someone/Qwen3-4B-pruned", "Qwen/Qwen3-40B", "Qwen/Qwen3-30B", "gpt2", ""])
def test_another_model_is_not_taken_for_one(name):
    assert known_shape(name) is None
