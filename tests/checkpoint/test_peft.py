"""Adapters to and from the real `peft`."""

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from difflm_jax.checkpoint.hf import load_params
from difflm_jax.checkpoint.names import PEFT_MASK_ROW, PROJECTIONS
from difflm_jax.checkpoint.peft import (
    CONFIG_FILE,
    DIFFUSION_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_diffusion_config,
    save_adapter,
    write_diffusion_config,
)
from difflm_jax.checkpoint.source import open_source
from difflm_jax.errors import UserError
from difflm_jax.lora import LoraConfig, init_lora

MASK_ID = 50
DIFFUSION = {"mask_token": "<m>", "mask_token_id": MASK_ID, "attention": "prefix", "logit_shift": True}


@pytest.fixture
def base(tmp_path, family, tiny_model):
    """(directory, source, params, torch model) of a base model of every family."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    source = open_source(str(tmp_path / "base"))
    return tmp_path / "base", source, load_params(source, "float32"), model


@pytest.fixture
def small_base(tmp_path, tiny_model):
    """The same for one family."""
    model = tiny_model("qwen3_tied")
    model.save_pretrained(tmp_path / "base")
    source = open_source(str(tmp_path / "base"))
    return tmp_path / "base", source, load_params(source, "float32"), model


@pytest.fixture
def masked_tokens_BL(tokens_BL) -> np.ndarray:
    return np.where(tokens_BL % 3 == 0, MASK_ID, tokens_BL)


def random_lora(params, config: LoraConfig) -> dict:
    """A tree in which no factor is zero."""
    lora = init_lora(jax.random.key(0), params, config, np.zeros(params["norm"]["weight"].shape))
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


def peft_model(model, **settings):
    """A peft model in which no factor is zero and the mask row is its own."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    adapted = get_peft_model(model, PeftLoraConfig(**{**defaults, **settings})).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name or "trainable_tokens" in name
                parameter.add_(0.2 * torch.randn_like(parameter))
    return adapted


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def save(directory, lora, config, **changes) -> None:
    defaults = {
        "base_model_name": "someone/base",
        "revision": None,
        "mask_token_id": MASK_ID,
        "diffusion_config": DIFFUSION,
    }
    save_adapter(directory, lora, config, **{**defaults, **changes})


# ---- ours -> peft


def test_peft_loads_ours_without_a_warning_and_gives_our_logits(
    base, tmp_path, masked_tokens_BL, our_logits, their_logits, caplog
):
    directory, source, params, model = base
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1)
    lora = random_lora(params, config)
    save(tmp_path / "adapter", lora, config, base_model_name=str(directory))
    before = their_logits(model, masked_tokens_BL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter").eval()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    theirs = their_logits(loaded, masked_tokens_BL)
    assert np.abs(theirs - before).max() > 0.1
    assert_close(our_logits(source.config, params, masked_tokens_BL, lora, config, MASK_ID), theirs)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=2.5, target_modules=("v_proj",), use_rslora=True),
        LoraConfig(r=5, lora_alpha=10, target_modules=("q_proj", "down_proj")),
    ],
)
def test_a_subset_of_projections(small_base, tmp_path, masked_tokens_BL, our_logits, their_logits, config):
    directory, source, params, _ = small_base
    lora = random_lora(params, config)
    save(tmp_path / "adapter", lora, config)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter").eval()
    ours = our_logits(source.config, params, masked_tokens_BL, lora, config, MASK_ID)
    assert_close(ours, their_logits(loaded, masked_tokens_BL))


def test_ours_come_back_as_they_were(small_base, tmp_path, tiny_tokenizer):
    _, source, params, _ = small_base
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.25, target_modules=("k_proj", "up_proj"), use_rslora=True)
    lora = random_lora(params, config)
    save(tmp_path / "a", lora, config, revision="v2", tokenizer=tiny_tokenizer, notes="Trained on facts.")
    adapter = load_adapter(tmp_path / "a", source.config)
    assert jax.tree.structure(adapter.lora) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, adapter.lora, lora)
    assert adapter.lora_config == config
    assert (adapter.mask_token_id, adapter.base_model_name) == (MASK_ID, "someone/base")
    assert adapter.diffusion_config == DIFFUSION == json.loads((tmp_path / "a" / DIFFUSION_FILE).read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("hello").input_ids == tiny_tokenizer("hello").input_ids
    card = (tmp_path / "a" / "README.md").read_text()
    for part in ("library_name: peft", 'base_model: "someone/base"', "Trained on facts.", "- PEFT "):
        assert part in card
    written = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert written["revision"] == "v2"
    assert "runtime_config" not in written
    assert set(written) <= set(PeftLoraConfig().to_dict())


def test_without_a_mask_row(small_base, tmp_path, tokens_BL, our_logits, their_logits):
    directory, source, params, _ = small_base
    config = LoraConfig(r=4, lora_alpha=6)
    lora = {"layers": random_lora(params, config)["layers"]}
    save(tmp_path / "a", lora, config, diffusion_config={})
    adapter = load_adapter(tmp_path / "a", source.config)
    assert "mask_row" not in adapter.lora
    assert adapter.mask_token_id is None
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "a").eval()
    assert_close(our_logits(source.config, params, tokens_BL, lora, config), their_logits(loaded, tokens_BL))


# ---- peft -> ours


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_of_peft_gives_its_logits(base, tmp_path, masked_tokens_BL, our_logits, their_logits, use_rslora):
    _, source, params, model = base
    adapted = peft_model(model, use_rslora=use_rslora, trainable_token_indices={"embed_tokens": [MASK_ID]})
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", source.config)
    assert adapter.mask_token_id == MASK_ID
    assert adapter.diffusion_config is None
    state = adapted.state_dict()
    for layer in range(source.config.num_layers):
        for projection, (block, name) in PROJECTIONS.items():
            for factor in ("lora_A", "lora_B"):
                theirs = state[f"base_model.model.model.layers.{layer}.{block}.{projection}.{factor}.default.weight"]
                np.testing.assert_array_equal(adapter.lora["layers"][block][name][factor][layer], theirs.numpy())
    ours = our_logits(source.config, params, masked_tokens_BL, adapter.lora, adapter.lora_config, MASK_ID)
    assert_close(ours, their_logits(adapted, masked_tokens_BL))


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", set(PROJECTIONS)),
        (r".*\.mlp\.(gate|up)_proj", {"gate_proj", "up_proj"}),
        (["self_attn.q_proj", "v_proj"], {"q_proj", "v_proj"}),
    ],
)
def test_target_modules_of_every_spelling(
    small_base, tmp_path, tokens_BL, our_logits, their_logits, target_modules, expected
):
    _, source, params, model = small_base
    adapted = peft_model(model, target_modules=target_modules)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", source.config)
    assert set(adapter.lora_config.target_modules) == expected
    assert "mask_row" not in adapter.lora
    ours = our_logits(source.config, params, tokens_BL, adapter.lora, adapter.lora_config)
    assert_close(ours, their_logits(adapted, tokens_BL))


def test_a_list_of_trained_tokens_means_the_embedding(small_base, tmp_path):
    _, source, _, model = small_base
    peft_model(model, trainable_token_indices=[MASK_ID]).save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", source.config)
    assert adapter.mask_token_id == MASK_ID
    assert adapter.lora["mask_row"].shape == (32,)


def test_half_precision_adapters_become_float32(small_base, tmp_path):
    _, source, _, model = small_base
    peft_model(model).to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", source.config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(adapter.lora)} == {"float32"}


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
        ({"layers_to_transform": [0]}, "layers_to_transform="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules lm_head"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices="),
        ({"trainable_token_indices": {"lm_head": [4]}}, "trainable_token_indices of lm_head"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_can_and_we_cannot(tiny_model, tmp_path, settings, message):
    model = tiny_model("qwen3")
    defaults = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(model, PeftLoraConfig(**{**defaults, **settings})).save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_adapter(tmp_path / "adapter", _config(tiny_model, "qwen3"))
    assert message in str(caught.value)
    assert CONFIG_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def _config(tiny_model, family, **changes):
    from difflm_jax.models.config import ModelConfig

    return ModelConfig.from_hf(tiny_model(family, **changes).config.to_dict())


@pytest.fixture
def edited(small_base, tmp_path):
    """`edited(config, weights)`: the error of loading our adapter after its two files were edited."""

    def run(edit_config=lambda config: None, edit_tensors=lambda tensors: None, config=None) -> str:
        _, source, params, _ = small_base
        directory = tmp_path / "adapter"
        settings = LoraConfig(r=4, target_modules=("q_proj", "o_proj"))
        save(directory, random_lora(params, settings), settings)
        values = json.loads((directory / CONFIG_FILE).read_text())
        edit_config(values)
        (directory / CONFIG_FILE).write_text(json.dumps(values))
        tensors = load_file(directory / WEIGHTS_FILE)
        edit_tensors(tensors)
        save_file(tensors, directory / WEIGHTS_FILE)
        with pytest.raises(UserError) as caught:
            load_adapter(directory, config or source.config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
O2 = "base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight"


def test_all_faults_of_the_tensors_are_in_one_error(edited):
    def edit(tensors):
        tensors["base_model.model.layers.0.self_attn.q_proj.lora_A.weight"] = tensors.pop(Q0)  # a wrong prefix
        tensors[O2] = tensors[O2][:, :3].copy()
        tensors[PEFT_MASK_ROW] = tensors[PEFT_MASK_ROW].astype(np.int32)

    message = edited(edit_tensors=edit)
    assert WEIGHTS_FILE in message
    assert "1 unknown (base_model.model.layers.0.self_attn.q_proj.lora_A.weight)" in message
    assert f"1 missing ({Q0})" in message
    assert f"1 misshapen ({O2} [32, 3] for [32, 4])" in message
    assert f"{PEFT_MASK_ROW} has dtype I32" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 8}, "misshapen"),
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": "4"}, "r must be a positive integer, not '4'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"an_option_of_tomorrow": {"on": 1}}, "an_option_of_tomorrow="),
        ({"target_modules": ["q_proj", "o_proj", "k_proj"]}, "k_proj.lora_A.weight"),
        ({"target_modules": ["q_proj", "wte"]}, "target_modules wte"),
        ({"trainable_token_indices": None}, f"1 unknown ({PEFT_MASK_ROW})"),
        ({"trainable_token_indices": {"embed_tokens": [96]}}, "outside the base model's 96 tokens"),
        ({"trainable_token_indices": {"embed_tokens": [7]}}, f"mask_token_id={MASK_ID}"),
    ],
)
def test_a_config_that_does_not_fit(edited, values, message):
    assert message in edited(edit_config=lambda config: config.update(values))


def test_several_problems_of_a_config_are_in_one_error(edited):
    message = edited(edit_config=lambda config: config.update(use_dora=True, bias="all", r=None))
    for part in ("use_dora=True", "bias='all'", "r must be"):
        assert part in message


def test_no_peft_type(edited):
    assert "peft_type is missing" in edited(edit_config=lambda config: config.pop("peft_type"))


def test_an_adapter_without_tensors(edited):
    message = edited(lambda config: config.update(target_modules="all-linear"), lambda tensors: tensors.clear())
    assert "missing" in message


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}])
def test_an_adapter_of_another_base(edited, tiny_model, change):
    message = edited(config=_config(tiny_model, "qwen3_tied", **change))
    assert "do not fit the base model" in message


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_a_file_that_is_not_safetensors(small_base, tmp_path, content):
    _, source, params, _ = small_base
    settings = LoraConfig(r=4)
    save(tmp_path / "adapter", random_lora(params, settings), settings)
    path = tmp_path / "adapter" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    with pytest.raises(UserError, match=rf"{WEIGHTS_FILE}: not a complete safetensors file"):
        load_adapter(tmp_path / "adapter", source.config)


def test_directories_that_are_no_adapters(small_base, tmp_path):
    directory, source, _, _ = small_base
    with pytest.raises(UserError, match=f"has no {CONFIG_FILE}"):
        load_adapter(directory, source.config)
    with pytest.raises(UserError, match=f"has no {CONFIG_FILE}"):
        load_adapter(tmp_path / "nowhere", source.config)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG_FILE).write_text("{}")
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled"):
        load_adapter(tmp_path / "old", source.config)


# ---- replacing and failing


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_adapter_is_replaced_whole(small_base, tmp_path, tiny_tokenizer):
    _, source, params, _ = small_base
    first, second = LoraConfig(r=4), LoraConfig(r=2, target_modules=("q_proj",))
    save(tmp_path / "a", random_lora(params, first), first, tokenizer=tiny_tokenizer)
    save(tmp_path / "a", random_lora(params, second), second)
    assert load_adapter(tmp_path / "a", source.config).lora_config.r == 2
    assert not (tmp_path / "a" / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("foreign", ["notes.txt", "adapter_config.json+runs"])
def test_another_directory_is_never_replaced(small_base, tmp_path, foreign):
    _, _, params, _ = small_base
    settings = LoraConfig(r=2)
    target = tmp_path / "mine"
    target.mkdir()
    for name in foreign.split("+"):
        (target / name).mkdir() if name == "runs" else (target / name).write_text("precious")
    with pytest.raises(UserError, match="exists and is not empty"):
        save(target, random_lora(params, settings), settings)
    assert sorted(path.name for path in target.iterdir()) == sorted(foreign.split("+"))


def test_a_failed_save_keeps_the_old_adapter(small_base, tmp_path):
    class Failing:
        def save_pretrained(self, directory):
            raise OSError("No space left on device")

    _, _, params, _ = small_base
    settings = LoraConfig(r=2)
    save(tmp_path / "a", random_lora(params, settings), settings)
    before = contents(tmp_path / "a")
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "a", random_lora(params, settings), settings, tokenizer=Failing(), notes="new")
    assert contents(tmp_path / "a") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_diffusion_config_of_a_directory(tmp_path):
    assert read_diffusion_config(tmp_path) is None
    write_diffusion_config(tmp_path, DIFFUSION)
    assert read_diffusion_config(tmp_path) == DIFFUSION
    (tmp_path / DIFFUSION_FILE).write_text("[1]")
    with pytest.raises(UserError, match=DIFFUSION_FILE):
        read_diffusion_config(tmp_path)
