"""Log-probabilities of causal answers that the engine reports."""

import numpy as np
import pytest
import torch
import transformers

import difflm_jax
from difflm_jax.serving.engine import Engine
from tests.serving.test_engine import request


@pytest.fixture(scope="module")
def base(tiny_dir):
    return difflm_jax.load(tiny_dir, causal=True, dtype="float32")


def test_probabilities_of_causal_answers_are_those_of_transformers_without_the_mask_token(base, tiny_dir):
    """The mask token, which is never chosen, had a share in every distribution."""
    asked = request(base, "causal", "Hi", logprobs=3)
    with Engine({"causal": base}) as engine:
        found = engine.submit(asked).result(60)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = oracle(torch.tensor([[*asked.tokens.tolist(), *found.tokens.tolist()]])).logits
    logits = logits[0, len(asked.tokens) - 1 : -1]
    logits[:, base.mask_token_id] = -torch.inf
    best = torch.log_softmax(logits, -1).topk(3)
    assert len(found.logprobs) == len(found.tokens) > 0
    for one, values, candidates in zip(found.logprobs, best.values.tolist(), best.indices.tolist(), strict=True):
        assert [token for token, _ in one.candidates] == candidates
        np.testing.assert_allclose([value for _, value in one.candidates], values, atol=1e-4)
        assert one.token == candidates[0]
        assert one.logprob == one.candidates[0][1]
