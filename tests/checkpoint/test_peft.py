"""Tests reading and writing adapters against the real `peft`."""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from difflm_jax.checkpoint.diffusion_config import read_diffusion_config
from difflm_jax.checkpoint.hf import load_params
from difflm_jax.checkpoint.names import PEFT_MASK_ROW
from difflm_jax.checkpoint.peft import Base, load_adapter, save_adapter
from difflm_jax.checkpoint.source import open_source
from difflm_jax.errors import UserError
from difflm_jax.models.lora import LoraConfig
from difflm_jax.models.weights import PROJECTIONS
from tests.checkpoint.adapters import CONFIG, MASK, WEIGHTS, config_of, trained_peft
from tests.checkpoint.gguf_files import write_gguf

DIFFUSION = {"mask_token": "<mask>", "mask_token_id": MASK, "attention": "prefix", "logit_shift": True}


@pytest.fixture
def save_ours(tmp_path, tiny_model, random_lora):
    """`save_ours(family, target, **changes)`: saves `base/` and our `adapter/` for it; returns params and lora."""

    def save(family: str = "qwen3", mask: bool = True, target: str = "adapter", tokenizer=None, **lora_options: Any):
        tiny_model(family).save_pretrained(tmp_path / "base")
        source = open_source(str(tmp_path / "base"))
        params = load_params(source, "float32")
        config = LoraConfig(**{"r": 4, "lora_alpha": 12, **lora_options})
        lora = random_lora(params, config)
        if not mask:
            del lora["mask_row"]
        save_adapter(
            tmp_path / target,
            lora,
            config,
            Base(str(tmp_path / "base"), None, source.config),
            DIFFUSION,
            tokenizer=tokenizer,
            notes="Trained on rhymes.",
        )
        return source.config, params, lora, config

    return save


def masked(tokens_BL: np.ndarray) -> np.ndarray:
    return np.where(tokens_BL % 3 == 0, MASK, tokens_BL)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ---- out


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"use_rslora": True}),  # tied: the mask row is an output row too
        ("qwen3", {"target_modules": ("q_proj", "v_proj"), "lora_alpha": 6.5}),
        ("qwen2", {"target_modules": ("down_proj",), "mask": False}),
    ],
)
def test_peft_loads_what_we_save_without_a_warning(
    family, options, tmp_path, save_ours, tokens_BL, our_logits, their_logits, caplog
):
    config, params, lora, lora_config = save_ours(family, **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens_BL = masked(tokens_BL)
    before = their_logits(base, tokens_BL)
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    # peft emits it with this transformers on every load, even for its own adapters
    assert not [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)]
    assert not caplog.records

    theirs = their_logits(adapted.eval(), tokens_BL)
    mask_token_id = MASK if "mask_row" in lora else None
    ours = our_logits(config, params, tokens_BL, lora, lora_config, mask_token_id)
    assert relative_error(before, theirs) > 0.01
    assert relative_error(ours, theirs) <= 1e-5
    by_hand = merged_by_hand(tmp_path, lora_config.scaling)
    assert relative_error(their_logits(by_hand, tokens_BL), theirs) <= 1e-5


def merged_by_hand(folder: Path, scaling: float) -> torch.nn.Module:
    """Returns the base plus B A, with the mask row set, using only the names in the file."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / "adapter" / WEIGHTS).items()}
    with torch.no_grad():
        for name, factor_A in tensors.items():
            if name.endswith(".lora_A.weight"):
                module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight += scaling * tensors[name.replace("lora_A", "lora_B")] @ factor_A
        if PEFT_MASK_ROW in tensors:
            model.model.embed_tokens.weight[MASK] = tensors[PEFT_MASK_ROW][0]
    return model


def test_the_files_of_an_adapter(tmp_path, save_ours, tiny_tokenizer):
    save_ours("llama", tokenizer=tiny_tokenizer, lora_dropout=0.05, use_rslora=True)
    adapter = tmp_path / "adapter"
    theirs = peft.PeftConfig.from_pretrained(adapter)
    assert (theirs.peft_type, theirs.task_type, theirs.inference_mode) == ("LORA", "CAUSAL_LM", True)
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout, theirs.use_rslora) == (4, 12, 0.05, True)
    assert theirs.target_modules == set(PROJECTIONS)
    assert theirs.trainable_token_indices == {"embed_tokens": [MASK]}
    assert (theirs.bias, theirs.modules_to_save, theirs.use_dora) == ("none", None, False)
    assert theirs.base_model_name_or_path == str(tmp_path / "base")
    text = (adapter / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert read_diffusion_config(adapter) == DIFFUSION
    assert read_diffusion_config(tmp_path) is None
    assert {array.dtype for array in load_file(adapter / WEIGHTS).values()} == {np.dtype(np.float32)}
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card and "Trained on rhymes." in card and "### Framework versions" in card
    assert AutoTokenizer.from_pretrained(adapter)("a b").input_ids == tiny_tokenizer("a b").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert (adapter / WEIGHTS).stat().st_mode & 0o777 == (adapter / CONFIG).stat().st_mode & 0o777


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_the_lines_of_the_readme_open_the_adapter_in_peft(kind, tmp_path, tiny_model, save_ours):
    """An adapter of a .gguf base: AutoPeftModelForCausalLM cannot find the base in its config."""
    config, _, lora, lora_config = save_ours("llama")
    base = tmp_path / "base"
    if kind == "gguf":
        base = write_gguf(tmp_path / "base.gguf", tiny_model("llama"))
    save_adapter(tmp_path / "out", lora, lora_config, Base(str(base), None, config), DIFFUSION)
    lines = (tmp_path / "out" / "README.md").read_text().split("```python\n")[2].split("```")[0]
    names: dict[str, Any] = {}
    exec(lines.replace("PATH/OF/THIS/ADAPTER", str(tmp_path / "out")), names)
    state = peft.get_peft_model_state_dict(names["model"])
    np.testing.assert_array_equal(
        state["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"],
        lora["layers"]["mlp"]["up_proj"]["lora_A"][1],
    )


def test_what_we_save_we_load(family, tmp_path, save_ours):
    config, _, lora, lora_config = save_ours(family, lora_dropout=0.1)
    adapter = load_adapter(tmp_path / "adapter", config)
    assert adapter.lora_config == lora_config
    assert (adapter.mask_token_id, adapter.diffusion_config) == (MASK, DIFFUSION)
    assert adapter.base_model_name == str(tmp_path / "base")
    assert jax.tree.structure(adapter.lora) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, adapter.lora, lora)


def test_an_adapter_is_replaced_and_nothing_else_is(tmp_path, save_ours):
    save_ours()
    (tmp_path / "adapter" / "stale.txt").write_text("")
    config, *_ = save_ours(r=2)
    assert load_adapter(tmp_path / "adapter", config).lora_config.r == 2
    assert not (tmp_path / "adapter" / "stale.txt").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="thesis: exists and is not empty"):
        save_ours(target="thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    with pytest.raises(UserError, match=r"chapter\.txt: is a file"):
        save_ours(target="thesis/chapter.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "thesis"]


def test_a_second_export_replaces_one_with_named_chat_templates(tmp_path, save_ours, tiny_tokenizer):
    """transformers saves all but the default template in a folder of their own."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    save_ours(tokenizer=tokenizer)
    templates = tmp_path / "adapter" / "additional_chat_templates"
    assert [path.name for path in templates.iterdir()] == ["tool_use.jinja"]
    save_ours(tokenizer=tokenizer)
    (templates / "notes").mkdir()
    with pytest.raises(UserError, match="adapter: exists and is not empty"):
        save_ours(tokenizer=tokenizer)


def test_a_failed_save_keeps_the_adapter_that_was_there(tmp_path, save_ours):
    class Failing:
        def save_pretrained(self, directory):
            raise OSError("No space left on device")

    config, *_ = save_ours()
    with pytest.raises(UserError, match=r"adapter: cannot be written \(No space left on device\)"):
        save_ours(r=2, tokenizer=Failing())
    assert load_adapter(tmp_path / "adapter", config).lora_config.r == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, save_ours, monkeypatch):
    config, *_ = save_ours()
    rename = Path.rename

    def refuse_new(path, target):
        if path.name == "new":
            raise OSError("Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(UserError, match=r"adapter: cannot be written \(Input/output error\)"):
        save_ours(r=2)
    assert load_adapter(tmp_path / "adapter", config).lora_config.r == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---- in


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_rslora": True}),
        ("qwen3", {"target_modules": r".*\.(self_attn\.[qv]|mlp\.down)_proj", "trainable_token_indices": [MASK]}),
        ("mistral", {"exclude_modules": ["o_proj"], "init_lora_weights": "gaussian"}),
        ("qwen3_tied", {"target_modules": ["k_proj", "self_attn.v_proj"], "trainable_token_indices": None}),
    ],
)
def test_we_load_what_peft_saved(family, options, tmp_path, tiny_model, tokens_BL, our_logits, their_logits):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    adapted = trained_peft(model, **options)
    adapted.save_pretrained(tmp_path / "adapter")
    source = open_source(str(tmp_path / "base"))
    adapter = load_adapter(tmp_path / "adapter", source.config)

    has_mask_row = options.get("trainable_token_indices", True) is not None
    assert ("mask_row" in adapter.lora) == has_mask_row
    assert adapter.mask_token_id == (MASK if has_mask_row else None)
    assert adapter.diffusion_config is None
    state = peft.get_peft_model_state_dict(adapted)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter.lora)) == sum(tensor.numel() for tensor in state.values())
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.lora)} == {jnp.dtype("float32")}
    for block, projections in adapter.lora["layers"].items():
        for name, factors in projections.items():
            for factor, leaf in factors.items():
                theirs = [state[f"base_model.model.model.layers.{i}.{block}.{name}.{factor}.weight"] for i in range(3)]
                np.testing.assert_array_equal(leaf, np.stack(theirs))

    tokens_BL = masked(tokens_BL)
    params = load_params(source, "float32")
    ours = our_logits(source.config, params, tokens_BL, adapter.lora, adapter.lora_config, adapter.mask_token_id)
    theirs = their_logits(adapted, tokens_BL)
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(our_logits(source.config, params, tokens_BL), theirs) > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2, "mlp.down_proj": 7}, "use_rslora": True},
        {"alpha_pattern": {r"layers\.[02]\..*_proj": 3, r"1\..*k_proj": 40}, "rank_pattern": {"^model.layers.1.*": 6}},
        {"target_modules": r".*layers\.[12]\..*(q|down)_proj"},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2], "trainable_token_indices": None},
    ],
)
def test_ranks_and_scalings_of_single_modules_and_layers(
    options, tmp_path, tiny_model, tokens_BL, our_logits, their_logits
):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "base")
    adapted = trained_peft(model, **options)
    adapted.save_pretrained(tmp_path / "adapter")
    source = open_source(str(tmp_path / "base"))
    adapter = load_adapter(tmp_path / "adapter", source.config)
    params, tokens_BL = load_params(source, "float32"), masked(tokens_BL)
    ours = our_logits(source.config, params, tokens_BL, adapter.lora, adapter.lora_config, adapter.mask_token_id)
    theirs = their_logits(adapted, tokens_BL)
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(our_logits(source.config, params, tokens_BL), theirs) > 0.01


def test_adapters_in_named_sub_folders_are_pointed_to(tmp_path, tiny_model):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(tiny_model("llama"), config, adapter_name="second").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no adapter_config\.json; name one of the adapters in it: second"):
        load_adapter(tmp_path, config_of(tiny_model("llama")))
    load_adapter(tmp_path / "second", config_of(tiny_model("llama")))


def test_half_precision_adapters_become_float32(tmp_path, tiny_model):
    adapted = trained_peft(tiny_model("llama"))
    adapted.to(torch.bfloat16).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, config_of(tiny_model("llama")))
    state = peft.get_peft_model_state_dict(adapted)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    assert state[name].dtype == torch.bfloat16
    np.testing.assert_array_equal(adapter.lora["layers"]["mlp"]["up_proj"]["lora_A"][2], state[name].float().numpy())


def test_two_files_that_name_two_mask_tokens(tmp_path, save_ours):
    config, *_ = save_ours()
    (tmp_path / "adapter" / "diffusion_config.json").write_text(json.dumps(DIFFUSION | {"mask_token_id": 7}))
    with pytest.raises(UserError, match=r"diffusion_config\.json has mask_token_id=7, but .* trains token 50"):
        load_adapter(tmp_path / "adapter", config)
