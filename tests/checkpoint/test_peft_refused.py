"""Adapters that are damaged, for another base, or not supported are refused in one line with the reason."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difflm_jax.checkpoint.names import PEFT_MASK_ROW
from difflm_jax.checkpoint.peft import load_adapter
from difflm_jax.errors import UserError
from tests.checkpoint.adapters import CONFIG, WEIGHTS, config_of, trained_peft


@pytest.fixture
def refusal(tmp_path, tiny_model):
    """`refusal(edit_config, edit_tensors, **peft options)`: the error line for a refused adapter."""

    def run(config=None, tensors=None, family: str = "qwen3", base: dict[str, Any] | None = None, **options) -> str:
        trained_peft(tiny_model(family), **options).save_pretrained(tmp_path)
        if config is not None:
            values = json.loads((tmp_path / CONFIG).read_text())
            config(values)
            (tmp_path / CONFIG).write_text(json.dumps(values))
        if tensors is not None:
            held = load_file(tmp_path / WEIGHTS)
            tensors(held)
            save_file(held, tmp_path / WEIGHTS)
        with pytest.raises(UserError) as caught:
            load_adapter(tmp_path, config_of(tiny_model(family, **(base or {}))))
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"bias": "lora_only", "modules_to_save": ["lm_head"]}, "bias='lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules lm_head are none of q_proj, k_proj"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices=[1, 2] must be the mask"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "trainable_token_indices of lm_head are not supported"),
    ],
)
def test_what_peft_can_and_we_cannot_is_named(refusal, options, message):
    said = refusal(**options)
    assert message in said and CONFIG in said
    assert ("merge it with peft (merge_and_unload" in said) == ("not supported" in message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"an_option_of_the_future": {"a": 1}}, "an_option_of_the_future={'a': 1} is not supported"),
        ({"r": "8"}, "r must be a positive integer, not '8'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
        ({"lora_dropout": "high"}, "lora_dropout must be at least 0 and below 1, not 'high'"),
        ({"use_rslora": "no"}, "use_rslora must be true or false, not 'no'"),
        ({"trainable_token_indices": {"embed_tokens": [96]}}, "[96] is outside the base model's 96 tokens"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern must hold integers"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map names of modules to numbers greater than 0"),
        ({"alpha_pattern": {"(q": 2}}, "alpha_pattern: '(q' is no regular expression"),
        ({"bias": "all", "use_bdlora": True}, "bias='all' is not supported; use_bdlora=True is not supported"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, not 'lm_head'"),
        ({"use_dora": "yes"}, "use_dora must be true or false, not 'yes'"),
    ],
)
def test_a_config_that_means_something_else_is_named(refusal, changes, message):
    assert message in refusal(lambda values: values.update(changes))


def test_a_config_without_a_type(refusal):
    assert "peft_type is missing" in refusal(lambda values: values.pop("peft_type"))


def test_unknown_missing_and_misshapen_tensors_in_one_error(refusal):
    layer = "base_model.model.model.layers.1"

    def edit(tensors):
        tensors["base_model.model.lm_head.weight"] = np.zeros((96, 32), np.float32)
        del tensors[f"{layer}.mlp.up_proj.lora_B.weight"]
        tensors[f"{layer}.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 32), np.float32)
        tensors[f"{layer}.self_attn.k_proj.lora_A.weight"] = np.zeros((4, 32), np.int8)

    message = refusal(tensors=edit)
    assert WEIGHTS in message
    assert "1 unknown (base_model.model.lm_head.weight)" in message
    assert f"1 missing ({layer}.mlp.up_proj.lora_B.weight)" in message
    assert f"1 misshapen ({layer}.self_attn.q_proj.lora_A.weight [3, 32] for [4, 32])" in message
    assert f"{layer}.self_attn.k_proj.lora_A.weight has dtype I8" in message


def test_a_wrong_prefix_is_not_an_empty_adapter(refusal):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.replace("base_model.model.", "", 1)] = tensors.pop(name)

    message = refusal(tensors=edit)
    assert "43 unknown (model." in message and "43 missing (base_model." in message


def test_an_adapter_of_an_untold_projection_set_that_holds_nothing(refusal):
    def edit(tensors):
        for name in list(tensors):
            if "lora_" in name:
                del tensors[name]

    assert "1 missing (every lora_A and lora_B)" in refusal(tensors=edit, target_modules=r".*\.mlp\.up_proj")


def test_a_mask_row_that_the_config_does_not_mention(refusal):
    message = refusal(lambda values: values.update(trainable_token_indices=None))
    assert f"1 unknown ({PEFT_MASK_ROW})" in message


def test_a_mask_row_that_is_not_there(refusal):
    assert f"1 missing ({PEFT_MASK_ROW})" in refusal(tensors=lambda tensors: tensors.pop(PEFT_MASK_ROW))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"hidden_size": 64}, "misshapen (base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [4, 32]"),
        ({"num_key_value_heads": 4}, "misshapen (base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"),
        ({"num_hidden_layers": 4}, "14 missing (base_model.model.model.layers.3."),
        ({"num_hidden_layers": 2}, "14 unknown (base_model.model.model.layers.2."),
    ],
)
def test_an_adapter_of_another_base(refusal, base, message):
    assert message in refusal(base=base)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle" + bytes(100), None])
def test_a_damaged_weights_file(tmp_path, tiny_model, content):
    trained_peft(tiny_model("qwen3")).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: not a complete safetensors file"):
        load_adapter(tmp_path, config_of(tiny_model("qwen3")))


def test_files_that_are_not_there(tmp_path, tiny_model):
    config = config_of(tiny_model("qwen3"))
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path, config)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tmp_path, config)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled and not opened"):
        load_adapter(tmp_path, config)


@pytest.mark.parametrize("text", ["", "[]", "{'r': 8}"])
def test_a_config_that_is_not_json(tmp_path, tiny_model, text):
    trained_peft(tiny_model("qwen3")).save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(tmp_path, config_of(tiny_model("qwen3")))
