"""Tests the table of names against state dicts of transformers and the names in `gguf` and `peft`."""

import peft
import pytest
from gguf import MODEL_ARCH, get_tensor_name_map

from difflm_jax.checkpoint.names import PEFT_MASK_ROW, get_path, set_path
from difflm_jax.checkpoint.peft_modules import peft_modules
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.weights import PROJECTIONS, table

ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}


def config_of(model) -> ModelConfig:
    return ModelConfig.from_hf(model.config.to_dict())


def test_the_table_is_the_state_dict(family, tiny_model):
    model = tiny_model(family)
    config = config_of(model)
    ours = {name: row.shape for row in table(config) for name in row.hf_names}
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert ours == theirs


def test_gguf_names_are_those_of_llama_cpp(family, tiny_model):
    config = config_of(tiny_model(family))
    names = get_tensor_name_map(ARCHITECTURES.get(config.model_type, MODEL_ARCH.QWEN3), config.num_layers)
    for row in table(config):
        for hf, gguf in zip(row.hf_names, row.gguf_names, strict=True):
            assert gguf == names.get_name(hf, try_suffixes=(".weight", ".bias"))


def test_peft_names_are_those_of_an_adapter_on_every_projection(family, tiny_model):
    model = tiny_model(family)
    config = config_of(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=list(PROJECTIONS), trainable_token_indices={"embed_tokens": [5]})
    )
    ours = {
        module.key(factor, layer)
        for module in peft_modules(config)
        for factor in ("lora_A", "lora_B")
        for layer in range(config.num_layers)
    }
    assert ours | {PEFT_MASK_ROW} == set(peft.get_peft_model_state_dict(adapted))


def test_a_path_of_a_tree():
    tree: dict = {}
    set_path(tree, ("a", "b", "c"), 1)
    set_path(tree, ("a", "d"), 2)
    assert tree == {"a": {"b": {"c": 1}, "d": 2}}
    assert get_path(tree, ("a", "b", "c")) == 1
    with pytest.raises(KeyError):
        get_path(tree, ("a", "x"))
