"""Tests 4-bit checkpoints: we read those of transformers, transformers reads ours, and adapters work on both."""

import json
import warnings

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config

import difflm_jax
from difflm_jax import UserError
from difflm_jax.config.files import load_config
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.quant import NestedScales, QTensor, QuantConfig, dequantize
from difflm_jax.training.run import open_configured
from tests.byte_tokenizer import byte_tokenizer

TOKENS = np.random.default_rng(0).integers(3, 250, (2, 17))


def bnb_config(double_quant: bool = True, **changes) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        **changes,
    )


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """An unquantised Qwen3 of two layers."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=264, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["nested", "plain", "skip", "skip a layer"])
def stored(request, base_dir, tmp_path_factory):
    """Returns (directory, torch model) of a checkpoint that transformers quantised and saved."""
    skipped = {"skip": ["o_proj", "lm_head"], "skip a layer": ["model.layers.1.mlp.up_proj", "lm_head"]}
    config = bnb_config(request.param != "plain", llm_int8_skip_modules=skipped.get(request.param))
    directory = tmp_path_factory.mktemp("stored")
    return directory, quantised_by_transformers(base_dir, directory, config), request.param


def quantised_by_transformers(base_dir, directory, config: BitsAndBytesConfig):
    """Returns the torch model, which is also saved in `directory`."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model


def logits(model) -> np.ndarray:
    """Returns logits with matmuls in float32. With AVX-512, bitsandbytes would multiply in bfloat16."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu, module.compute_dtype = False, torch.float32
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def test_a_stored_checkpoint_gives_the_logits_of_transformers(stored, capfd):
    directory, model, kind = stored
    lm = difflm_jax.load(directory, causal=True, dtype="float32")
    assert np.abs(np.asarray(lm(TOKENS)) - logits(model)).max() <= 2e-3
    layers = lm.params["layers"]
    assert isinstance(layers["self_attn"]["q_proj"]["weight"], QTensor)
    assert isinstance(layers["self_attn"]["q_proj"]["weight"].scales, NestedScales) == (kind != "plain")
    assert isinstance(layers["self_attn"]["o_proj"]["weight"], QTensor) == (kind != "skip")
    assert isinstance(layers["mlp"]["up_proj"]["weight"], QTensor) == (kind != "skip a layer")
    assert ("quantised in some layers only" in capfd.readouterr().out) == (kind == "skip a layer")
    assert lm.quantization.format == "nf4"


def test_quantising_ourselves_gives_the_same_weights(base_dir, tmp_path):
    quantised_by_transformers(base_dir, tmp_path, bnb_config())
    ours = difflm_jax.load(base_dir, causal=True, dtype="float32", quantization="nf4")
    theirs = difflm_jax.load(tmp_path, causal=True, dtype="float32")
    a, b = (lm.params["layers"]["mlp"]["down_proj"]["weight"] for lm in (ours, theirs))
    np.testing.assert_array_equal(a.codes, b.codes)
    expected = np.asarray(theirs(TOKENS))  # scales' codes may differ, see tests/quant/test_nf4.py
    assert np.abs(np.asarray(ours(TOKENS)) - expected).max() <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_we_save(base_dir, tmp_path, dtype):
    lm = difflm_jax.load(base_dir, causal=True, dtype=dtype, quantization="nf4")
    lm.save_pretrained(tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    weights = lm.params["layers"]["mlp"]["down_proj"]["weight"]
    for layer in (0, 1):
        theirs = model.model.layers[layer].mlp.down_proj.weight
        values = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state).float().numpy()
        ours = dequantize(jax.tree.map(lambda leaf, i=layer: leaf[i], weights), lm.model.dtype)
        np.testing.assert_array_equal(np.asarray(ours, np.float32), values)
    if dtype == "float32":
        assert np.abs(np.asarray(lm(TOKENS)) - logits(model)).max() <= 2e-3
    back = difflm_jax.load(tmp_path / "ours", causal=True, dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)


def adapted(lm: difflm_jax.LanguageModel) -> difflm_jax.LanguageModel:
    config = LoraConfig(r=4)
    lora = init_lora(jax.random.key(0), lm.params, config, jnp.full(128, 0.2))
    return lm.with_adapter(
        jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora), config
    )


@pytest.mark.parametrize(("double_quant", "tolerance"), [(False, 2e-3), (True, 1e-2)])
def test_an_adapter_over_nf4_loads_in_peft_over_bitsandbytes(base_dir, tmp_path, double_quant, tolerance):
    """With double quantisation, a few scales differ by one code: bitsandbytes' search on a CPU is approximate."""
    held = QuantConfig("nf4", double_quant=double_quant)
    lm = adapted(difflm_jax.load(base_dir, causal=True, dtype="float32", quantization=held))
    lm.save_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        base_dir, quantization_config=bnb_config(double_quant), dtype=torch.float32
    )
    plain = logits(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not [w for w in caught if "missing adapter keys" in str(w.message)]
    found = logits(model)
    assert np.abs(found - plain).max() > 0.1
    assert np.abs(np.asarray(lm(TOKENS)) - found).max() <= tolerance


def test_an_adapter_loads_in_peft_over_the_very_base_it_was_trained_on(base_dir, tmp_path):
    lm = adapted(difflm_jax.load(base_dir, causal=True, dtype="float32", quantization="nf4"))
    lm.save_adapter(tmp_path / "adapter")
    difflm_jax.load(base_dir, dtype="float32", quantization="nf4").save_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert np.abs(np.asarray(lm(TOKENS)) - logits(model)).max() <= 2e-3


def test_codes_are_not_trained_in_full(stored):
    with pytest.raises(UserError, match="stored as nf4, and codes cannot be trained"):
        open_configured(load_config("", [f"model={stored[0]}", "trained=all"]))


@pytest.mark.parametrize("quantization", ["nf4", "int4", "int8"])
def test_a_merged_export_is_dense_and_says_what_it_is(base_dir, tmp_path, quantization):
    lm = adapted(difflm_jax.load(base_dir, causal=True, dtype="float32", quantization=quantization))
    merged = lm.merge()
    assert not any(isinstance(leaf, QTensor) for leaf in jax.tree.leaves(merged.params, is_leaf=_is_qtensor))
    np.testing.assert_allclose(merged(TOKENS), lm(TOKENS), atol=2e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert f"as {quantization} holds it, dequantised" in (tmp_path / "merged" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logits(model), np.asarray(lm(TOKENS)), atol=2e-3)


def _is_qtensor(leaf) -> bool:
    return isinstance(leaf, QTensor)


def test_integer_formats_have_no_checkpoint_of_their_own(base_dir, tmp_path):
    lm = difflm_jax.load(base_dir, quantization="int8")
    with pytest.raises(UserError, match="no Hugging Face checkpoint holds int8"):
        lm.save_pretrained(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def broken(directory, tmp_path, change):
    """Copies a stored checkpoint and applies `change(config, tensors)`."""
    target = tmp_path / "broken"
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config, tensors = json.loads((target / "config.json").read_text()), load_file(target / "model.safetensors")
    change(config, tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return target


NAME = "model.layers.0.mlp.up_proj.weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"
FAULTS = {
    "another method": (lambda c, t: c["quantization_config"].update(quant_method="awq"), "'awq' is not supported"),
    "8 bits": (lambda c, t: c["quantization_config"].update(load_in_4bit=False), "load_in_8bit is not supported"),
    "fp4": (lambda c, t: c["quantization_config"].update(bnb_4bit_quant_type="fp4"), "'fp4' is not supported"),
    "no statistics": (lambda c, t: t.pop(NAME + ".nested_absmax"), f"{NAME}.nested_absmax, which the checkpoint lacks"),
    "no state": (lambda c, t: t.pop(STATE), f"{NAME}.absmax"),
    "no JSON": (lambda c, t: t.update({STATE: np.frombuffer(b"{oops", np.uint8)}), "is no quantisation state"),
    "short codes": (lambda c, t: t.update({NAME: t[NAME][:-1]}), f"{NAME}: holds"),
    "another map": (lambda c, t: t.update({NAME + ".quant_map": np.ones(16, np.float32)}), "is not the map of NF4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_refused_by_name(base_dir, tmp_path, fault):
    change, message = FAULTS[fault]
    difflm_jax.load(base_dir, dtype="float32", quantization="nf4").save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError) as caught:
        difflm_jax.load(broken(tmp_path / "whole", tmp_path, change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_format_than_the_stored_one_is_refused(base_dir, tmp_path):
    difflm_jax.load(base_dir, dtype="float32", quantization="nf4").save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"is held as .*nf4.* already; leave quantization empty"):
        difflm_jax.load(tmp_path / "whole", quantization="int8")
