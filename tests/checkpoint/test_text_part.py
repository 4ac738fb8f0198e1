"""Tests the text part of checkpoints that also read images against the whole model in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, Gemma4Config, Mistral3Config

import difflm_jax
from difflm_jax.models.lora import LoraConfig, init_lora
from tests.byte_tokenizer import byte_tokenizer
from tests.families import FAMILIES, SIZES

_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
WHOLE = {
    "gemma3": (Gemma3Config, "gemma3_text", {"mm_tokens_per_image": 4}),
    "gemma4": (Gemma4Config, "gemma4_text", {}),
    "mistral3": (Mistral3Config, "ministral3", {}),
}

# Gemma 4's norm of values magnifies last bits here: peft's own merge is 7e-5 from its adapter.
_LIMITS = {"gemma3": 1e-5, "gemma4": 3e-4, "mistral3": 1e-5}
_TOWERS = {"gemma3": "siglip_vision_model", "gemma4": "gemma4_vision", "mistral3": "pixtral"}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_text_part_and_its_adapter_give_the_logits_of_the_whole(kind, tmp_path):
    config_class, text, own = WHOLE[kind]
    inner = {**SIZES, **FAMILIES[text], "vocab_size": 264, "model_type": text}
    vision = {**_VISION, "model_type": _TOWERS[kind]}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_class(text_config=inner, vision_config=vision, **own))
    spread = 0.1 if kind == "gemma4" else 0.2  # its scores are not scaled: larger weights saturate them
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    model.float().eval().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    lm = difflm_jax.load(tmp_path / "base", causal=True, dtype="float32")
    tokens = np.random.default_rng(0).integers(3, 250, (2, 12))

    def theirs(model) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(tokens)).logits.numpy()

    expected = theirs(model)
    assert np.abs(lm(tokens) - expected).max() <= 1e-4 * np.abs(expected).max()

    lora_config = LoraConfig(r=2)
    lora = init_lora(jax.random.key(0), lm.params, lora_config, jnp.full(32, 0.2))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora)
    lm = lm.with_adapter(lora, lora_config)
    lm.save_adapter(tmp_path / "adapter")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(whole, tmp_path / "adapter")
    tokens[:, 3] = lm.mask_token_id
    expected = theirs(adapted.eval())
    again = difflm_jax.load(tmp_path / "base", adapter=tmp_path / "adapter", causal=True, dtype="float32")
    assert np.abs(again(tokens) - expected).max() <= _LIMITS[kind] * np.abs(expected).max()

    lm.merge().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert np.abs(theirs(merged) - expected).max() <= _LIMITS[kind] * np.abs(expected).max()
