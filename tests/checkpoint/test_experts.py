"""Tests experts in all forms of files: fused, in MXFP4, quantised while reading, in PEFT's adapters."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import difflm_jax
from difflm_jax.errors import UserError
from difflm_jax.models.flops import parameters
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.quant import QuantConfig, quantize
from tests.byte_tokenizer import byte_tokenizer
from tests.families import FAMILIES, torch_model

TOKENS = np.random.default_rng(0).integers(3, 250, (2, 12)).astype(np.int32)


def error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.numpy()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Returns (directory written by transformers, its model): a dense layer, and one with experts."""
    directory = tmp_path_factory.mktemp("qwen3_moe")
    model = torch_model("qwen3_moe", **{**FAMILIES["qwen3_moe"], "vocab_size": 264})
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory, model


@pytest.fixture(scope="module")
def lm(qwen):
    return difflm_jax.load(qwen[0], causal=True, dtype="float32")


def test_tensors_that_hold_all_experts_of_a_layer_are_read(qwen, lm, tmp_path):
    """They are named as in transformers 5's memory."""
    directory, model = qwen
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    state |= {"lm_head.weight": model.state_dict()["lm_head.weight"].clone()}
    assert state["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 48, 32)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    byte_tokenizer().save_pretrained(tmp_path)
    fused = difflm_jax.load(tmp_path, causal=True, dtype="float32")
    for ours, theirs in zip(jax.tree.leaves(fused.params), jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mxfp4_experts_are_those_that_transformers_decodes(tmp_path):
    changes = {**FAMILIES["gpt_oss"], "hidden_size": 64, "intermediate_size": 32, "vocab_size": 264}
    model = torch_model("gpt_oss", **changes)
    state, random = dict(model.state_dict()), torch.Generator().manual_seed(0)
    packed = {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(122, 126, blocks.shape[:3], generator=random, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.state_dict()[name].copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file({**{name: x.contiguous() for name, x in state.items()}, **packed}, tmp_path / "model.safetensors")
    stated = {**model.config.to_dict(), "quantization_config": {"quant_method": "mxfp4"}, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    byte_tokenizer().save_pretrained(tmp_path)
    lm = difflm_jax.load(tmp_path, causal=True, dtype="float32")
    assert error(lm(TOKENS), logits_of(model)) <= 1e-4
    quantised = difflm_jax.load(tmp_path, causal=True, dtype="float32", quantization=QuantConfig("int8", 32))
    own = lm.params["layers"]["mlp"]["experts"]["up_proj"]["weight"][1, 2]
    stored = quantised.params["layers"]["mlp"]["experts"]["up_proj"]["weight"]
    np.testing.assert_array_equal(stored.codes[1, 2], quantize(own, QuantConfig("int8", 32)).codes)
    with pytest.raises(UserError, match="holds the experts of a layer in one tensor"):
        quantised.save_pretrained(tmp_path / "quantised")


def test_an_adapter_of_experts_that_peft_made_gives_its_logits(qwen, tmp_path):
    directory, _ = qwen
    torch.manual_seed(0)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory), PeftLoraConfig(r=2, lora_alpha=3, target_modules=targets)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path)
    lm = difflm_jax.load(directory, adapter=tmp_path, causal=True, dtype="float32")
    assert lm.model.lora.routed_experts
    expected = logits_of(made.eval())
    assert error(lm(TOKENS), expected) <= 1e-5
    lm.save_adapter(tmp_path / "ours")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "ours").eval()
    assert error(logits_of(again), expected) <= 1e-5


def test_experts_are_adapted_only_where_that_is_asked_for(lm):
    config = LoraConfig(r=2)
    lora = init_lora(jax.random.key(0), lm.params, config, None)
    assert set(lora["layers_0"]["mlp"]) == {"gate_proj", "up_proj", "down_proj"}  # the dense layer
    assert set(lora["layers_1"]) == {"self_attn"}
    routed = init_lora(jax.random.key(0), lm.params, LoraConfig(r=2, routed_experts=True), None)
    assert routed["layers_1"]["mlp"]["experts"]["down_proj"]["lora_A"].shape == (1, 4, 2, 24)
    dense = {"layers": {"self_attn": lm.params["layers_1"]["self_attn"]}}
    with pytest.raises(UserError, match="the model has no routed experts"):
        init_lora(jax.random.key(0), dense, LoraConfig(target_modules=("q_proj",), routed_experts=True), None)


def test_experts_in_bfloat16_compute_as_the_others_do(qwen, lm):
    """On a CPU, a loop stores them as bits."""
    half = difflm_jax.load(qwen[0], causal=True, dtype="bfloat16")
    assert error(half(TOKENS), np.asarray(lm(TOKENS))) <= 0.05


def test_a_model_has_more_parameters_than_a_token_passes_through(qwen, lm):
    total, active = parameters(lm.config)
    assert total == sum(parameter.numel() for parameter in qwen[1].parameters())
    assert total - active == 2 * 3 * 24 * 32  # two of four experts
