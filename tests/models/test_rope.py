"""RoPE of every type, as transformers 4 and 5 spell it, against transformers' own frequencies."""

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.rope import inverse_frequencies
from tests.families import FAMILIES, SIZES

_GEMMA4 = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "head_dim": 8, "attention_k_eq_v": True}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0}
BESIDE = {"original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
# name -> (model_type, keys of config.json)
SPELLINGS = {
    "nothing": ("llama", {}),
    "theta": ("llama", {"rope_theta": 5e5}),
    "theta in rope_parameters": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "both thetas": ("llama", {"rope_theta": 3e3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "linear, type": ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "linear, rope_type": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama3, legacy": ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3, **BESIDE}, "rope_theta": 5e5}),
    "llama3, no original length": ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama3, original length beside": ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, **BESIDE}),
    "yarn, no original length": ("qwen3", {"rope_scaling": {"rope_type": "yarn", **YARN}}),
    "yarn, original length inside": ("qwen3", {"rope_scaling": {"type": "yarn", **YARN, **BESIDE}}),
    "yarn, original length beside rope_scaling": ("qwen3", {"rope_scaling": {"rope_type": "yarn", **YARN}, **BESIDE}),
    "yarn, original length beside rope_parameters": (
        "qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}, **BESIDE},
    ),
    "yarn, two original lengths": (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 32}, **BESIDE},
    ),
    "yarn, factor null": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": None, **BESIDE}}),
    "yarn, mscale": (
        "llama", {"rope_scaling": {"rope_type": "yarn", **YARN, **BESIDE, "mscale": 0.7, "mscale_all_dim": 1.0}},
    ),
    "rope_scaling replaces rope_parameters": (
        "llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default",
                                                                                        "rope_theta": 5e5}},
    ),
    "longrope, ratio of lengths": (
        "phi3", {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 32,
                 "partial_rotary_factor": 0.5},
    ),
    "longrope, factor": (
        "phi3", {"rope_scaling": {"type": "longrope", **LONG, "factor": 32.0}, "partial_rotary_factor": 0.5,
                 "original_max_position_embeddings": 32},
    ),
    "partial, legacy": ("stablelm", {"partial_rotary_factor": 0.5, "rope_theta": 5e5}),
    "partial, by default": ("nemotron", {}),
    "gemma 3, legacy": (
        "gemma3_text", {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "layer_types": ["full_attention"] * 4,
                        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 8},
    ),
    "apertus, by default": ("apertus", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_frequencies_are_those_of_transformers(name):
    model_type, keys = SPELLINGS[name]
    written = {**SIZES, "max_position_embeddings": 128, "model_type": model_type, **keys}
    ours = ModelConfig.from_hf(written)
    theirs = CONFIG_MAPPING[model_type].from_dict({k: v for k, v in written.items() if k != "model_type"})
    with torch.device("meta"):
        rotary = type(AutoModelForCausalLM.from_config(theirs).model.rotary_emb)
    rotary = rotary(config=theirs)
    prefix = "full_attention_" if hasattr(rotary, "full_attention_inv_freq") else ""
    frequencies, factor = inverse_frequencies(ours.rope, ours.head_dim)
    np.testing.assert_allclose(frequencies, getattr(rotary, f"{prefix}inv_freq").numpy(), rtol=1e-6)
    assert factor == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"), rel=1e-6)


def test_rows_that_would_need_the_long_factors_are_too_long():
    """LongRoPE uses other frequencies beyond the original length. They are not implemented."""
    model_type, keys = SPELLINGS["longrope, ratio of lengths"]
    config = ModelConfig.from_hf({**SIZES, "max_position_embeddings": 128, "model_type": model_type, **keys})
    assert config.max_position_embeddings == 32


def test_the_first_name_of_longrope_is_understood():
    """Phi-3's first releases say "su", which transformers 5.23 no longer reads."""
    model_type, keys = SPELLINGS["longrope, ratio of lengths"]
    written = {**SIZES, "model_type": model_type, **keys}
    renamed = {**written, "rope_scaling": {**written["rope_scaling"], "type": "su"}}
    assert ModelConfig.from_hf(renamed) == ModelConfig.from_hf(written)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_key_that_a_config_leaves_out_is_what_transformers_fills_in(model_type):
    needed = {"ministral3": ("rope_parameters",), "hunyuan_v1_dense": ("head_dim",), "ministral": ("head_dim",)}
    needed |= dict.fromkeys(("gemma4_text", "gemma4_unified_text"), ("hidden_size_per_layer_input",))
    own = {key: FAMILIES[model_type][key] for key in needed.get(model_type, ())}
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("_id")} | own
    filled = CONFIG_MAPPING[model_type](**sizes).to_dict()
    assert ModelConfig.from_hf({**sizes, "model_type": model_type}) == ModelConfig.from_hf(filled)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' needs alpha"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "shape": 3}}, "has unknown keys shape"),
        ({"rope_scaling": {"type": "mrope"}}, "rope type 'mrope' is not supported"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}},
            "must be a list of numbers",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1.0 is not supported for 'llama'"),
        ({"layer_types": ["linear_attention"] * 4}, "'linear_attention' (recurrent"),
        ({"layer_types": ["sliding_attention"] * 4}, "'llama' has no layers of type 'sliding_attention'"),
        ({"use_bidirectional_attention": True}, "such a model is an encoder already"),
        ({"final_logit_softcapping": 3.0}, "final_logit_softcapping=3.0 is not supported for model_type 'llama'"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6' is not supported"),
        ({"model_type": "smollm3", "no_rope_layers": [0] * 4}, "no layer has a rotary position embedding"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 4}, "in every layer"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "LLG"}, "give layer_types"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm=True is not supported"),
        ({"model_type": "glm", "partial_rotary_factor": 0.4, "head_dim": 8}, "must be an even number"),
        ({"model_type": "qwen3_next"}, "are linear attention (Gated DeltaNet), which see earlier tokens only"),
        ({"model_type": "falcon_h1"}, "are Mamba-2"),
        ({"model_type": "mamba2"}, "all its layers are recurrent"),
        ({"model_type": "lfm2"}, "short causal convolutions"),
        ({"model_type": "t5gemma", "is_encoder_decoder": True}, "is_encoder_decoder=true"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "reads images too (vision_config); use a text model"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 8}, "its attention is latent (kv_lora_rank)"),
        ({"model_type": "gemma4_text"}, "hidden_size_per_layer_input=256 (an embedding per layer, as in E2B and E4B)"),
        (
            {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 18},
            "num_kv_shared_layers=18 (layers without keys of their own, as in E2B and E4B) is not supported",
        ),
        (
            {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "enable_moe_block": True},
            "enable_moe_block=True (experts next to the MLP, as in 26B-A4B) is not supported",
        ),
        (
            {**_GEMMA4, "per_layer_config": {"1": {"head_dim": 16, "intermediate_size": 8}}},
            "intermediate_size of per_layer_config is not supported",
        ),
        ({**_GEMMA4, "per_layer_config": {"0": {"head_dim": 16}}}, "must say the same of all global layers"),
        ({"model_type": "diffusion_gemma_text"}, "use gemma4_text"),
        ({"model_type": "gpt2"}, "it has learned positions"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias=True is not supported"),
        ({"model_type": "phimoe", "num_local_experts": 8}, "mixtures of experts of this kind are not"),
        ({"model_type": "mixtral", "num_local_experts": 1}, "num_experts_per_tok=2 is more than num_experts=1"),
        ({"model_type": "nobody"}, "model_type 'nobody' is not supported (known: "),
    ],
)
def test_what_cannot_be_represented_is_named(keys, message):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf({**SIZES, "model_type": "llama", **keys})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "smollm3", "starcoder2", "glm4", "seed_oss", "ernie4_5", "ministral3"]
)
def test_a_key_that_is_left_out_has_the_default_of_transformers(family):
    """Regression: in a trimmed config.json, key-value heads defaulted to attention heads, and ministral3 lost YaRN."""
    whole = transformers.AutoConfig.for_model(family)
    given = {
        key: value for key, value in whole.to_dict().items() if key not in ("num_key_value_heads", "rope_parameters")
    }
    ours = ModelConfig.from_hf(given)
    assert ours.num_kv_heads == whole.num_key_value_heads
    assert ours.ropes == ModelConfig.from_hf(whole.to_dict()).ropes


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("olmo3", {"sliding_window_pattern": 2}),
        ("olmo3", {"rope_local_base_freq": 123.0, "rope_theta": 7e4}),
        ("granite_swa", {"sliding_window_pattern": 2}),
        ("gemma2", {"sliding_window_pattern": 3}),
        ("gemma3_text", {"sliding_window_pattern": 3, "rope_local_base_freq": 123.0}),
        ("cohere2", {"sliding_window_pattern": 3}),
        ("exaone4", {"sliding_window_pattern": 3}),
    ],
)
def test_a_pattern_of_windows_and_a_local_theta_count_where_transformers_reads_them(model_type, keys):
    """Regression: olmo3 and granite_swa read keys of Gemma 3 that transformers 5.23 ignores."""
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("_id")} | {"num_hidden_layers": 6}
    theirs = CONFIG_MAPPING[model_type](**sizes, **keys).to_dict()
    found = ModelConfig.from_hf({**sizes, **keys, "model_type": model_type})
    for key in keys.keys() - {"rope_theta"}:  # kept as attributes, but without effect
        theirs.pop(key, None)
    expected = ModelConfig.from_hf(theirs)
    assert (found.windows, found.layer_ropes, found.ropes) == (expected.windows, expected.layer_ropes, expected.ropes)
