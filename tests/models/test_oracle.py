"""Logits against `transformers`, for every family and option, causal and not, with padding on either side."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.models.attention import positions_of
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer, head_logits
from tests.tiny import hidden_states, params_from_state_dict

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
CASES = {
    "qwen3-tied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied-bias": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen2-mha-tied": (Qwen2Config, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama-bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (LlamaConfig, {"head_dim": 24, "tie_word_embeddings": True}),
    "llama-llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "qwen3-yarn": (Qwen3Config, {"head_dim": 16, "rope_parameters": YARN}),
    "llama-yarn-factor": (LlamaConfig, {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16}}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(torch model, our config, our params) of a case."""
    config_class, changes = CASES[request.param]
    torch.manual_seed(0)
    hf_config = config_class(**{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # the library's own init leaves biases at zero and attention flat
            parameter.add_(0.2 * torch.randn_like(parameter))
    config = ModelConfig.from_hf(hf_config.to_dict())
    return model, config, params_from_state_dict(config, {k: v.numpy() for k, v in model.state_dict().items()})


def rows(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, 20] and their mask, padded on `side`."""
    tokens = np.random.default_rng(1).integers(0, 101, (3, 20))
    valid = np.ones((3, 20), bool)
    for row, length in enumerate((20, 13, 5)):
        if side == "left":
            valid[row, : 20 - length] = False
        elif side == "right":
            valid[row, length:] = False
    return tokens, valid


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("rule", ["causal", "full", "prefix", "block"])
def test_logits_equal_transformers(pair, side, rule):
    torch_model, config, params = pair
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
    bias = torch.where(torch.tensor(allowed)[:, None], 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = torch_model(
            torch.tensor(tokens), attention_mask=bias, position_ids=torch.tensor(positions), use_cache=False
        ).logits.numpy()
    diffusion = DiffusionConfig(rule, 4 if rule == "block" else 0)
    hidden = hidden_states(Transformer(config), diffusion, {"params": params}, tokens, valid, prompts)
    logits = np.asarray(head_logits(config, params, None, None, hidden))
    assert np.abs(logits - expected)[valid].max() <= 1e-4 * np.abs(expected[valid]).max()


def test_causal_flag_matches_the_library_without_any_mask_of_ours(pair):
    torch_model, config, params = pair
    tokens, valid = rows("none")
    with torch.no_grad():
        expected = torch_model(torch.tensor(tokens)).logits.numpy()
    causal = DiffusionConfig("causal")
    hidden = hidden_states(Transformer(config), causal, {"params": params}, tokens, valid, np.zeros(3, int))
    logits = np.asarray(head_logits(config, params, None, None, hidden))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
