"""What a model is: every origin keeps what it knows. transformers and peft are the oracles."""

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import difflm_jax
from difflm_jax.config.files import load_config, to_json
from difflm_jax.errors import UserError
from difflm_jax.loading import ModelSpec, open_model, spec_of_names
from difflm_jax.quant import QuantConfig
from difflm_jax.training.run import train
from tests.tiny_checkpoint import save_tiny_model

TOKENS = [[5, 9, 80, 33, 120, 7, 61, 4]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A PEFT adapter that peft wrote; it knows nothing of diffusion."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    path = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(path)
    return path


def test_a_foreign_adapter_does_not_hide_what_the_merged_checkpoint_was_trained_for(model, adapter, tmp_path):
    lm = difflm_jax.load(model, attention="block", block_length=4, logit_shift=True, dtype="float32")
    lm.save_pretrained(tmp_path / "merged")
    again = open_model(ModelSpec(str(tmp_path / "merged"), adapter=str(adapter)))
    assert (again.attention, again.block_length, again.logit_shift) == ("block", 4, True)
    assert open_model(ModelSpec(str(tmp_path / "merged"), adapter=str(adapter), attention="full")).block_length == 0


def test_the_base_of_a_merged_model_is_the_original_base(model, adapter):
    merged = difflm_jax.load(model, adapter=adapter, dtype="float32").merge()
    theirs = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        base = theirs(torch.tensor(TOKENS)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(theirs, adapter)(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(merged.base()(TOKENS), base, atol=2e-4)
    assert np.abs(adapted - base).max() > 0.05 and merged.base() is merged.base()


@pytest.mark.parametrize("named", ["nf4", "int8"])
def test_quantization_of_a_run_keeps_its_block_size(tmp_path, named):
    config = load_config(overrides=["use_qlora=true", "quantization_block_size=32", "double_quantization=false"])
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "sft_model").mkdir()
    (tmp_path / "sft_model" / "adapter_config.json").write_text("{}")
    spec = spec_of_names(run=str(tmp_path), quantization=named)
    assert spec.quantization == QuantConfig(named, 32, double_quant=False)
    assert (spec.converted is None) == (named != "nf4")
    assert spec_of_names(run=str(tmp_path), quantization="none").quantization is None


def test_tokenizer_and_chat_template_next_to_an_adapter_are_used(model, adapter, tmp_path, capsys):
    """TRL and axolotl save what they trained with there."""
    own = AutoTokenizer.from_pretrained(model)
    own.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    path = tmp_path / "adapter"
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).save_pretrained(path)
    spec = ModelSpec(str(model), adapter=str(path))
    assert open_model(spec).tokenizer.chat_template != own.chat_template
    (path / "chat_template.jinja").write_text(own.chat_template)
    assert open_model(spec).tokenizer.chat_template == own.chat_template
    own.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    own.save_pretrained(path)
    lm = open_model(spec)
    assert lm.tokenizer("<|tool|>")["input_ids"] == own("<|tool|>")["input_ids"]
    assert f"note: {path}: its own tokenizer and chat template are used" in capsys.readouterr().err
    assert lm.prompts.prompt("hi").tolist() == own("[hi]")["input_ids"]


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused_before_training(tmp_path):
    """A model of 258 rows with a tokenizer whose <|im_end|> is 258: training used to end with exit 0."""
    small = save_tiny_model(tmp_path / "model", vocab_size=258, eos_token_id=None, pad_token_id=None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    keys = {"model": small, "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "run", "cache_dir": tmp_path}
    overrides = [f"{key}={value}" for key, value in keys.items()] + ["mask_token=~", "phases=sft", "max_length=64"]
    with pytest.raises(UserError, match=r"'<\|im_end\|>' has id 258, but the model's embedding has 258 rows"):
        train(load_config(overrides=overrides))
    assert not (tmp_path / "run").exists()


def test_a_mask_token_that_is_no_token_is_said(model, capsys):
    """A typing mistake took a row that was never trained, without a word."""
    lm = open_model(ModelSpec(str(model), mask_token="<|maks|>"))
    assert lm.tokenizer.convert_ids_to_tokens(lm.mask_token_id) == "<|maks|>"
    said = capsys.readouterr().err
    assert said.startswith(
        f"note: mask_token='<|maks|>' is no token of {model}; it takes the free row {lm.mask_token_id} "
    )
    for known in (ModelSpec(str(model), mask_token="<|mask|>"), ModelSpec(str(model)), ModelSpec(str(model)).causal()):
        open_model(known)
    assert capsys.readouterr().err == ""
