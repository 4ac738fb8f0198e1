"""Tests every kind of LoRA adapter against `peft`, DoRA and saved modules, and what is refused for them."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import difflm_jax
from difflm_jax import export, generate, serve
from difflm_jax.cli import run_command
from difflm_jax.errors import UserError
from difflm_jax.loading import ModelSpec, open_model
from difflm_jax.quant import QuantConfig
from difflm_jax.train import command
from tests.checkpoint.adapters import WEIGHTS, trained_peft
from tests.data.cases import case_ids, cases
from tests.tiny_run import make_rows, train_arguments

PLAIN = {"trainable_token_indices": None}


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer):
    """`base(family)`: a tiny transformers model, saved with a tokenizer in `base/`."""

    def make(family: str):
        model = tiny_model(family)
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return model

    return make


@pytest.fixture
def logits(tmp_path, tokens_BL):
    """Returns our logits of the adapter in `adapter/` on the base in `base/`, as a causal model."""
    return lambda **options: np.asarray(
        difflm_jax.load(tmp_path / "base", causal=True, dtype="float32", mask_token="<unk>", **options)(tokens_BL)
    )


@pytest.mark.parametrize("case", cases("adapters"), ids=case_ids(cases("adapters")))
def test_an_adapter_is_what_peft_makes_of_it(case, base, tmp_path, tokens_BL, their_logits):
    model, tokens_BL = base(case.given), np.where(tokens_BL % 4 == 0, 3, tokens_BL)  # 3 is <unk>, which may be trained
    plain = their_logits(model, tokens_BL)
    adapted = trained_peft(model, **case.options)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = their_logits(adapted, tokens_BL)
    assert np.abs(expected - plain).max() > 0.05
    options = {"dtype": "float32", "adapter": tmp_path / "adapter", "mask_token": "<unk>"}
    lm = difflm_jax.load(tmp_path / "base", causal=True, **options)
    assert np.abs(np.asarray(lm(tokens_BL)) - expected).max() <= 1e-5 * np.abs(expected).max()
    base_logits = np.asarray(lm.base()(tokens_BL))
    assert np.abs(base_logits - plain).max() <= 1e-5 * np.abs(plain).max()  # the base without the adapter


def test_dora_of_projections_that_share_a_tensor(tmp_path, tiny_tokenizer, logits, tokens_BL, their_logits):
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    adapted = trained_peft(model, **PLAIN, use_dora=True, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    expected = their_logits(adapted, tokens_BL)
    found = logits(adapter=tmp_path / "adapter")
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_embedding_that_grew_with_its_tokenizer(base, tmp_path, tokens_BL, their_logits):
    """TRL's and axolotl's ChatML add rows, and embedding and head are saved whole (peft saves them three times)."""
    model = base("qwen3")
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(104)
    adapted = trained_peft(grown, **PLAIN, modules_to_save=["embed_tokens", "lm_head"])
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = np.where(tokens_BL % 5 == 0, 100, tokens_BL)
    found = difflm_jax.load(
        tmp_path / "base", causal=True, dtype="float32", adapter=tmp_path / "adapter", mask_token="<unk>"
    )
    assert found.config.vocab_size == 104 and model.config.vocab_size == 96
    expected = their_logits(adapted, tokens)
    assert np.abs(np.asarray(found(tokens)) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_commands_take_it_and_export_writes_the_merged_model(base, tmp_path, tokens_BL, their_logits, capfd):
    adapted = trained_peft(base("qwen3_tied"), **PLAIN, use_dora=True, modules_to_save=["lm_head"])
    adapted.save_pretrained(tmp_path / "adapter")
    names = [f"--model={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}", "--dtype=float32"]
    run = ["generate", *names, "--prompt=a", "--max_new_tokens=4", "--steps=2", "--mask_token=<unk>"]
    assert run_command(generate.main, generate.FLAGS, "", run) == 0, capfd.readouterr().err
    out = ["export", *names, "--mask_token=<unk>"]
    assert run_command(export.main, export.FLAGS, "", [*out, "--to=peft", f"--out={tmp_path / 'p'}"]) == 1
    assert "is a PEFT adapter as it stands; --to=merged" in capfd.readouterr().err
    assert run_command(export.main, export.FLAGS, "", [*out, "--to=merged", f"--out={tmp_path / 'm'}"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    expected = their_logits(adapted, tokens_BL)
    assert np.abs(their_logits(merged, tokens_BL) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_it_cannot_be_used_for_is_one_line_that_says_what_to_do(base, tmp_path, capfd):
    trained_peft(base("qwen3"), **PLAIN, use_dora=True).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"use_dora=True is merged .* nf4: write the merged model first"):
        stored = QuantConfig("nf4", 16)
        difflm_jax.load(tmp_path / "base", quantization=stored, adapter=tmp_path / "adapter", mask_token="<unk>")
    rows = make_rows(tmp_path / "rows.jsonl")
    start = train_arguments(tmp_path / "base", rows, tmp_path, f"--config.adapter={tmp_path / 'adapter'}")
    assert command([*start, "--config.mask_token=<unk>"]) == 1
    said = capfd.readouterr().err
    assert "training does not resume in them: write the merged model (difflm export" in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"), "1 missing (base"),
        (lambda t: t.update({"base_model.model.lm_head.weight": np.ones((95, 32), np.float32)}), "1 misshapen (base"),
        (lambda t: t.update({"base_model.model.score.weight": np.ones((2, 32), np.float32)}), "1 unknown (base_model"),
    ],
)  # fmt: skip
def test_tensors_of_another_base_are_named(edit, message, base, tmp_path):
    trained_peft(base("qwen3"), **PLAIN, use_dora=True, modules_to_save=["lm_head"]).save_pretrained(
        tmp_path / "adapter"
    )
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    edit(held)
    save_file(held, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError) as caught:
        difflm_jax.load(tmp_path / "base", adapter=tmp_path / "adapter", mask_token="<unk>")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_gives_it_weights_of_its_own(base, tmp_path, tokens_BL):
    """Regression: models of a server share the first one's weights, so DoRA's would have served every adapter."""
    for name, options in (("dora", {"use_dora": True}), ("lora", {})):
        trained_peft(base("qwen3"), **PLAIN, **options).save_pretrained(tmp_path / name)
    given = {"dtype": "float32", "mask_token": "<unk>", "attention": "causal", "logit_shift": True}
    specs = {name: ModelSpec(str(tmp_path / "base"), str(tmp_path / name), **given) for name in ("dora", "lora")}
    models = serve._with_weights({name: open_model(spec) for name, spec in specs.items()}, None)
    assert list(models) == ["dora", "lora"]
    for name, lm in models.items():
        options = {"adapter": tmp_path / name, "dtype": "float32", "mask_token": "<unk>"}
        alone = difflm_jax.load(tmp_path / "base", causal=True, **options)
        np.testing.assert_array_equal(np.asarray(lm(tokens_BL)), np.asarray(alone(tokens_BL)))
