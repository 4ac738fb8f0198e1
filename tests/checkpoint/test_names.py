"""The table of names, against the modules that transformers, peft and llama.cpp's own table give."""

import re

import gguf
import pytest
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from difflm_jax.checkpoint.names import PEFT_MASK_ROW, PROJECTIONS, get_path, peft_lora_name, set_path, table
from difflm_jax.models.config import ModelConfig

_GGUF_ARCHITECTURE = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
}


@pytest.fixture
def model(family, tiny_model):
    return tiny_model(family)


@pytest.fixture
def config(model) -> ModelConfig:
    return ModelConfig.from_hf(model.config.to_dict())


def test_names_and_shapes_are_those_of_transformers(model, config):
    ours = {name: row.shape for row in table(config) for name in row.hf_names(config.num_layers)}
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert ours == theirs


def test_gguf_names_are_those_of_llama_cpp(config):
    theirs = gguf.get_tensor_name_map(_GGUF_ARCHITECTURE[config.model_type], config.num_layers)
    for row in table(config):
        pairs = zip(row.hf_names(config.num_layers), row.gguf_names(config.num_layers), strict=True)
        for hf_name, gguf_name in pairs:
            assert theirs.get_name(hf_name, try_suffixes=(".weight", ".bias")) == gguf_name


def test_peft_names_are_those_of_peft(model, config):
    settings = LoraConfig(r=2, target_modules=list(PROJECTIONS), trainable_token_indices={"embed_tokens": [5]})
    theirs = set(get_peft_model_state_dict(get_peft_model(model, settings)))
    ours = {
        peft_lora_name(projection, factor, layer)
        for projection in PROJECTIONS
        for factor in ("lora_A", "lora_B")
        for layer in range(config.num_layers)
    }
    assert theirs == ours | {PEFT_MASK_ROW}


def test_a_tree_is_built_and_read_by_path(config):
    tree: dict = {}
    for row in table(config):
        set_path(tree, row.path, row.hf)
    for row in table(config):
        assert get_path(tree, row.path) == row.hf
        assert row.stacked == bool(re.search(r"layers\.\{layer\}\.", row.hf))
