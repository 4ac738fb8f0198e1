"""The experts that a token is routed to, and the reported load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.objective import loss_sums
from difflm_jax.evaluation.masked import summarise
from difflm_jax.models.attention import positions_of
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.moe import within_groups
from difflm_jax.models.transformer import Transformer
from tests.families import FAMILIES, torch_model
from tests.tiny import params_from_state_dict

LENGTHS = np.array([16, 9])


@pytest.fixture(scope="module")
def olmoe():
    """(torch model, our model, our params)."""
    theirs = torch_model("olmoe", **FAMILIES["olmoe"])
    config = ModelConfig.from_hf(theirs.config.to_dict())
    params = params_from_state_dict(config, {name: x.numpy() for name, x in theirs.state_dict().items()})
    return theirs, Transformer(config, mask_token_id=100), params


def test_tokens_go_to_the_experts_that_transformers_chooses(olmoe):
    theirs, model, params = olmoe
    tokens = np.random.default_rng(0).integers(0, 99, (2, 16))
    valid = np.ones((2, 16), bool)
    positions = positions_of(jnp.asarray(valid))
    view = DiffusionConfig("causal").view(Layout(positions, valid, np.zeros(2, int)))
    _, updated = model.apply({"params": params}, tokens, positions, view, mutable=["routing"])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens), output_router_logits=True).router_logits
    for chosen, expected in zip(updated["routing"]["layers"]["mlp"]["chosen"], logits, strict=True):
        expected = expected.view(2, 16, -1).topk(2).indices.numpy()
        np.testing.assert_array_equal(np.sort(chosen, axis=-1), np.sort(expected, axis=-1))


def test_the_load_of_experts_counts_real_tokens(olmoe):
    _, model, params = olmoe
    answer = np.arange(16) < LENGTHS[:, None]
    tokens, ids = np.full((2, 16), 7, np.int32), np.arange(2, dtype=np.int32)
    batch = CleanBatch.of_rows(*map(jnp.asarray, (tokens, LENGTHS, answer, np.zeros(2, np.int32), ids, ids / 2)))
    corruption = Corruption(DiffusionConfig("full", mask_token_id=100))
    _, sums = loss_sums(model, {"params": params}, batch, jax.random.key(0), corruption, 16, False)
    assert sums.expert_tokens.shape == (2, 4)
    np.testing.assert_array_equal(sums.expert_tokens.sum(axis=1), 2 * LENGTHS.sum())
    busiest = np.asarray(sums.expert_tokens).max(axis=1) / (2 * LENGTHS.sum() / 4)
    assert summarise(jax.device_get(sums))["expert_load"] == pytest.approx(busiest.mean())
    assert 1 <= busiest.mean() <= 2


def test_only_the_best_groups_are_chosen_from():
    scores = jnp.array([[9.0, 0.0, 5.0, 5.0, 6.0, 3.0, 1.0, 1.0]])
    kept = within_groups(scores, 4, 2)  # sums of the two best: 9, 10, 9, 2
    np.testing.assert_array_equal(np.isfinite(kept[0]), [1, 1, 1, 1, 0, 0, 0, 0])
