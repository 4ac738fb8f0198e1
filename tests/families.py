"""A tiny model of every family, with the features that set it apart turned on; shared by tests against transformers."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "rope_theta": 1e4}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.5,
}  # fmt: skip
_LOCAL = ["sliding_attention", "full_attention"] * 2
_BY_TYPE = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
_ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 1e4, "factor": 1.0}
_LLAMA4_SCALE = {**YARN, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.1}

_GEMMA4 = {
    "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0, "sliding_window": 5, "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# model_type -> what its config has beyond SIZES; windows are shorter than the rows of the tests
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "layer_types": _LOCAL},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": {**_GEMMA4, "attention_k_eq_v": False, "num_hidden_layers": 3, "layer_types": None},
    "phi3": {"rope_parameters": {**_LONG, "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 32,
             "sliding_window": 7},
    "olmo2": {},
    "olmo3": {"sliding_window": 5, "rope_parameters": _BY_TYPE},
    "granite": _MULTIPLIERS,
    "granite_swa": {**_MULTIPLIERS, "sliding_window": 5, "layer_rope_theta": [0, 1e4, 5e3, 1e4]},
    "smollm3": {},
    "starcoder2": {"sliding_window": 6},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 5},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "exaone4": {"sliding_window": 5},
    "seed_oss": {"head_dim": 16, "attention_out_bias": True},
    "helium": {"head_dim": 8},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "hunyuan_v1_dense": {"head_dim": 16, "rope_parameters": _ALPHA},
    "apertus": {},
    "arcee": {},
    "nemotron": {"head_dim": 8},
    "ministral": {"head_dim": 8, "sliding_window": 5},
    "ministral3": {"head_dim": 8, "sliding_window": 6, "rope_parameters": _LLAMA4_SCALE},
    "jais2": {},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "olmoe": {**_EXPERTS, "num_experts": 4},
    "granitemoe": {**_EXPERTS, **_MULTIPLIERS, "num_local_experts": 4},
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
                 "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    "gpt_oss": {**_EXPERTS, "num_local_experts": 4, "head_dim": 8, "sliding_window": 6, "swiglu_limit": 1.0},
}  # fmt: skip


def torch_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model of transformers in which no parameter or stored buffer is at zero or one."""
    torch.manual_seed(0)
    hf_config = CONFIG_MAPPING[model_type](**{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval().float()
    stored = model.state_dict().keys()
    buffers = [each for name, each in model.named_buffers() if name in stored and each.is_floating_point()]
    with torch.no_grad():  # the library's own init leaves biases at zero and attention flat
        for tensor in [*model.parameters(), *buffers]:
            tensor.add_(0.2 * torch.randn_like(tensor))
    return model
