"""Logits against `transformers`, for every family and option, causal and not, with padding on either side."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.models.attention import positions_of
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.families import FAMILIES as OURS
from difflm_jax.models.transformer import Transformer, head_logits
from tests.families import FAMILIES, LLAMA3, YARN, torch_model
from tests.tiny import params_from_state_dict

CASES = {
    **{name: (name, changes) for name, changes in FAMILIES.items()},
    "qwen3-untied-bias": ("qwen3", {"head_dim": 8, "tie_word_embeddings": False, "attention_bias": True}),
    "qwen2-mha-tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24, "tie_word_embeddings": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16}}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "gemma3-capped": ("gemma3_text", {**FAMILIES["gemma3_text"], "final_logit_softcapping": 3.0}),
    "stablelm-serial": ("stablelm", {}),
}


def test_every_family_has_a_tiny_model_here_and_a_row_in_the_docs():
    assert set(OURS) == set(FAMILIES)
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert not [name for name in OURS if f"| `{name}` |" not in page]


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(torch model, our config, our params) of a case."""
    model_type, changes = CASES[request.param]
    model = torch_model(model_type, **changes)
    config = ModelConfig.from_hf(model.config.to_dict())
    return model, config, params_from_state_dict(config, {k: v.numpy() for k, v in model.state_dict().items()})


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, positions, view):
    """Returns logits; one program serves all masks."""
    return head_logits(
        config, params, None, None, Transformer(config).apply({"params": params}, tokens, positions, view)
    )


def rows(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [3, 20] and their mask, padded on `side`."""
    tokens = np.random.default_rng(1).integers(0, 101, (3, 20))
    valid = np.ones((3, 20), bool)
    for row, length in enumerate((20, 13, 5)):
        if side == "left":
            valid[row, : 20 - length] = False
        elif side == "right":
            valid[row, length:] = False
    return tokens, valid


def ours(config, params, rule, tokens, valid, prompts):
    diffusion = DiffusionConfig(rule, 4 if rule == "block" else 0)
    positions = positions_of(valid)
    view = diffusion.view(Layout(positions, valid, prompts))
    return np.asarray(logits_of(config, params, tokens, positions, view))


def bias_of(allowed: np.ndarray) -> torch.Tensor:
    return torch.where(torch.tensor(allowed)[:, None], 0.0, torch.finfo(torch.float32).min)


def their_masks(model, allowed: np.ndarray, positions: np.ndarray):
    """Returns 4-D masks for transformers: one per type of layer, or one for all. Local layers see both sides."""
    window = getattr(model.config, "sliding_window", None)
    near = np.abs(positions[:, :, None] - positions[:, None, :]) < (window or 10**6)
    if getattr(model.config, "layer_types", None) is not None:
        return {"full_attention": bias_of(allowed), "sliding_attention": bias_of(allowed & near)}
    return bias_of(allowed & near)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("rule", ["causal", "full", "prefix", "block"])
def test_logits_equal_transformers(pair, side, rule):
    model, config, params = pair
    tokens, valid = rows(side)
    positions = np.asarray(positions_of(valid))
    prompts = np.array([7, 4, 2])
    allowed = np.broadcast_to(valid[:, None, :], (3, 20, 20)).copy()
    not_after = positions[:, None, :] <= positions[:, :, None]
    if rule == "causal":
        allowed &= not_after
    elif rule == "prefix":
        allowed &= not_after | (positions[:, :, None] >= prompts[:, None, None])
    elif rule == "block":
        number = np.where(positions < prompts[:, None], -1, (positions - prompts[:, None]) // 4)
        allowed &= not_after | ((number[:, None, :] <= number[:, :, None]) & (number[:, :, None] >= 0))
    with torch.no_grad():
        expected = model(
            torch.tensor(tokens),
            attention_mask=their_masks(model, allowed, positions),
            position_ids=torch.tensor(positions),
            use_cache=False,
        ).logits.numpy()
    logits = ours(config, params, rule, tokens, valid, prompts)
    assert np.abs(logits - expected)[valid].max() <= 1e-4 * np.abs(expected[valid]).max()


def test_causal_flag_matches_the_library_without_any_mask_of_ours(pair):
    model, config, params = pair
    tokens, valid = rows("none")
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    logits = ours(config, params, "causal", tokens, valid, np.zeros(3, int))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
