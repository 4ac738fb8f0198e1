"""Third-party mixtures of experts: small random instances of their published architectures."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax import UserError
from tests.byte_tokenizer import byte_tokenizer
from tests.oracles.diffusion_mixtures import D, E, F, H, K, Mixture, V, W, X

_COMMON = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": H, "num_key_value_heads": K,
    "hidden_act": "silu", "head_dim": E, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "num_experts": X,
    "num_experts_per_tok": 3, "attention_dropout": 0.0, "initializer_range": 0.02, "rope_scaling": None,
    "use_cache": False, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "eos_token_id": 258,
    "pad_token_id": 256, "mask_token_id": 259, "output_router_logits": False,
}  # fmt: skip
CONFIGS = {
    "llada2_moe": {
        **_COMMON, "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "intermediate_size": F,
        "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"}, "moe_intermediate_size": W,
        "embedding_dropout": 0.0, "output_dropout": 0.0, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "num_shared_experts": 2, "norm_topk_prob": True, "moe_router_enable_expert_bias": True, "norm_head": False,
        "partial_rotary_factor": 0.5, "rope_theta": 600000, "routed_scaling_factor": 2.5, "router_dtype": "fp32",
        "score_function": "sigmoid", "use_bias": False, "use_qk_norm": True, "use_qkv_bias": False, "rotary_dim": 4,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    },
    "lladamoe": {
        **_COMMON, "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "attention_bias": False,
        "auto_map": {"AutoModel": "modeling_lladamoe.LLaDAMoEModelLM"}, "clip_qkv": None, "moe_layer_freq": [0, 1],
        "dense_intermediate_size": F, "expert_intermediate_size": W, "shared_expert_intermediate_size": None,
        "qk_layernorm": True, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False,
        "router_aux_loss_coef": 0.01, "router_num_group": None, "router_topk_group": None, "routed_scaling_factor": 1,
        "norm_topk_prob": None, "rope_theta": 50000.0, "partial_rotary_factor": 1.0,
    },
    "sdar_moe": {
        **_COMMON, "model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "intermediate_size": F,
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM"}, "attention_bias": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": W, "norm_topk_prob": True,
        "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 28, "fuse_cross_entropy": True, "block_size": 4,
    },
}  # fmt: skip
TRAINED_FOR = {
    "llada2_moe": ("block_causal", 32), "lladamoe": ("full", 0), "sdar_moe": ("block_causal", 4),
}  # fmt: skip


def written(directory, config):
    reference = Mixture(config)
    byte_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in reference.tensors.items()}, directory / "model.safetensors"
    )
    return reference


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_what_it_was_trained_for(family, tmp_path):
    reference = written(tmp_path, CONFIGS[family])
    lm = difflm_jax.load(tmp_path, dtype="float32")
    assert (lm.attention, lm.block_length) == TRAINED_FOR[family]
    assert (lm.logit_shift, lm.mask_token_id) == (False, 259)
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([reference(row, lm.block_length) for row in tokens]).numpy()
    assert np.abs(np.asarray(lm(tokens.numpy())) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_llada_2_is_saved_as_a_model_that_transformers_has(tmp_path):
    """q, k and v are separate, as in GLM 4.5. transformers' model is causal, since it has no other attention."""
    (tmp_path / "theirs").mkdir()
    reference = written(tmp_path / "theirs", CONFIGS["llada2_moe"])
    difflm_jax.load(tmp_path / "theirs", dtype="float32").save_pretrained(tmp_path / "ours")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, 250, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.eval()(tokens[None]).logits[0]
    torch.testing.assert_close(found, reference(tokens, block=1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llada2_moe", {"score_function": "softmax"}, "score_function=softmax"),
        ("llada2_moe", {"use_qkv_bias": True}, "use_qkv_bias=True"),
        ("llada2_moe", {"topk_group": 5}, "do not divide"),
        ("llada2_moe", {"n_group": 8, "topk_group": 4}, "n_group=8: groups of one expert"),
        ("lladamoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("lladamoe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("lladamoe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        ("lladamoe", {"some_new_gate": 1}, "some_new_gate: not known for model_type 'lladamoe'"),
        ("sdar_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
    ],
)
def test_what_is_not_represented_is_refused_by_name(family, change, named, tmp_path):
    written(tmp_path, {**CONFIGS[family]})
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[family], **change}))
    with pytest.raises(UserError, match=named):
        difflm_jax.load(tmp_path)
