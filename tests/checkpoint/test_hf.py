"""Tests reading and writing Hugging Face directories against transformers' own files and loading."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from difflm_jax.checkpoint import hf
from difflm_jax.checkpoint.hf import load_params, save_pretrained
from difflm_jax.checkpoint.source import open_source
from difflm_jax.errors import UserError
from difflm_jax.models.lora import LoraConfig, merge_lora

INDEX = "model.safetensors.index.json"


def weights_of(model) -> dict[str, torch.Tensor]:
    """Returns the state dict without the copy of a tied embedding."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }


# ---- in


@pytest.mark.parametrize(("dtype", "shard_size"), [("float32", "5GB"), ("bfloat16", "30KB"), ("float16", "5GB")])
def test_every_tensor_of_every_family(family, dtype, shard_size, tmp_path, tiny_model, assert_same_weights):
    model = tiny_model(family).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "30KB")
    source = open_source(str(tmp_path))
    assert set(source.shapes) == set(weights_of(model))
    assert_same_weights(load_params(source, dtype), weights_of(model))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_of_a_loaded_model(family, tmp_path, tiny_model, tokens_BL, our_logits, their_logits):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    ours = our_logits(source.config, load_params(source, "float32"), tokens_BL)
    theirs = their_logits(model, tokens_BL)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_mixed_dtypes_become_the_one_asked_for(tmp_path, tiny_model, assert_same_weights):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(weights_of(model).items())}
    save_torch(mixed, tmp_path / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in mixed.items()}
        assert_same_weights(load_params(open_source(str(tmp_path)), dtype), expected)


def test_an_equal_copy_of_a_tied_head_is_accepted_and_another_refused(tmp_path, tiny_model, assert_same_weights):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_weights(load_params(open_source(str(tmp_path)), "float32"), weights_of(model))
    tensors["lm_head.weight"][3, 5] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_params(open_source(str(tmp_path)), "float32")


def test_old_rotary_buffers_are_not_unknown(tmp_path, tiny_model, assert_same_weights):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_weights(load_params(open_source(str(tmp_path)), "float32"), weights_of(model))


def test_real_checkpoint_greedy_text(shared_data, our_logits):
    directory = shared_data / "stories260K"
    expected = json.loads((directory / "expected_greedy.json").read_text())
    source = open_source(str(directory))
    tokenizer = source.load_tokenizer()
    assert tokenizer.decode(expected["greedy_ids"], skip_special_tokens=True).strip() == expected["text"].strip()
    tokens = np.asarray(expected["greedy_ids"])[None]
    logits = our_logits(source.config, load_params(source, "float32"), tokens)  # one pass predicts every next token
    start = len(expected["prompt_ids"])
    np.testing.assert_array_equal(logits[0, start - 1 : -1].argmax(-1), tokens[0, start:])


def test_unknown_config_keys_are_announced_in_one_line(tmp_path, tiny_model, caplog):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"flux": 1, "warp": 2}))
    with caplog.at_level(logging.WARNING):
        open_source(str(tmp_path))
    (record,) = [record for record in caplog.records if record.name.startswith("difflm_jax")]
    assert record.getMessage().endswith("flux, warp")


# ---- out


@pytest.mark.parametrize(("dtype", "shard_bytes"), [("float32", 20_000), ("bfloat16", 5_000_000_000)])
def test_transformers_loads_what_we_save(
    family, dtype, shard_bytes, tmp_path, tiny_model, tiny_tokenizer, assert_same_weights, monkeypatch
):
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", shard_bytes)
    model = tiny_model(family).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in")
    source = open_source(str(tmp_path / "in"))
    params = load_params(source, dtype)
    save_pretrained(
        tmp_path / "out", params, source.config, source.hf_config, tiny_tokenizer, "# A card\n", {"mask_token_id": 5}
    )

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert loaded.dtype == getattr(torch, dtype)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["dtype"] == stored["torch_dtype"] == dtype  # transformers 5 reads the first, 4 the second
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # safetensors makes files readable only by their owner
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert (tmp_path / "out" / INDEX).exists() == (shard_bytes == 20_000)
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    if family != "qwen2":  # transformers uses Qwen's splitting for every qwen2 checkpoint, whatever its files say
        assert tokenizer("hello there.").input_ids == tiny_tokenizer("hello there.").input_ids
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert_same_weights(load_params(open_source(str(tmp_path / "out")), dtype), weights_of(model))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merged_adapter_gives_the_adapted_logits(
    family, tmp_path, tiny_model, tiny_tokenizer, random_lora, tokens_BL, our_logits, their_logits
):
    mask_id = 50
    tiny_model(family).save_pretrained(tmp_path / "in")
    source = open_source(str(tmp_path / "in"))
    params = load_params(source, "float32")
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True)
    lora = random_lora(params, config)
    tokens_BL = np.where(tokens_BL % 3 == 0, mask_id, tokens_BL)
    ours = our_logits(source.config, params, tokens_BL, lora, config, mask_id)
    base = our_logits(source.config, params, tokens_BL)
    merged = merge_lora(params, lora, config, mask_id)
    save_pretrained(tmp_path / "out", merged, source.config, source.hf_config, tiny_tokenizer, "", {})
    theirs = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens_BL)
    assert np.abs(ours - base).max() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_save_refuses_an_occupied_directory_and_leaves_it(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    source = open_source(str(tmp_path / "in"))
    params = load_params(source, "float32")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    with pytest.raises(UserError, match="exists and is not empty"):
        save_pretrained(tmp_path / "in", params, source.config, source.hf_config, tiny_tokenizer, "", {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    tiny_model("llama").save_pretrained(tmp_path / "in")
    source = open_source(str(tmp_path / "in"))
    params = load_params(source, "float32")
    monkeypatch.setattr("difflm_jax.checkpoint.safetensors.save_file", full)
    with pytest.raises(UserError, match=r"out: cannot be written \(I/O error: No space left on device\)"):
        save_pretrained(tmp_path / "out", params, source.config, source.hf_config, tiny_tokenizer, "", {})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_failed_save_leaves_nothing(tmp_path, tiny_model, monkeypatch):
    class Failing:
        def save_pretrained(self, directory):
            assert (Path(directory) / "model.safetensors").exists()
            raise OSError("No space left on device")

    tiny_model("llama").save_pretrained(tmp_path / "in")
    source = open_source(str(tmp_path / "in"))
    params = load_params(source, "float32")
    with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"):
        save_pretrained(tmp_path / "out", params, source.config, source.hf_config, Failing(), "", {})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- bad input


@pytest.fixture
def broken(tmp_path, tiny_model):
    """`broken(edit)`: the error of loading a sharded checkpoint after `edit(directory)`."""

    def run(edit) -> str:
        tiny_model("qwen3").save_pretrained(tmp_path, max_shard_size="30KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        edit(tmp_path)
        with pytest.raises(UserError) as caught:
            load_params(open_source(str(tmp_path)), "float32")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def edit_shard(directory: Path, edit) -> str:
    path = sorted(directory.glob("*.safetensors"))[1]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path.name


def edit_index(directory: Path, edit) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_everything_wrong_is_in_one_error(broken):
    def edit(directory):
        shards = sorted(directory.glob("*.safetensors"))
        first = load_file(shards[0])

        def change(tensors):
            names = sorted(tensors)
            tensors["model.layers.0.mystery.weight"] = tensors.pop(names[0])
            tensors[names[1]] = tensors[names[1]][..., :-1].copy()
            tensors[names[2]] = tensors[names[2]].astype(np.int32)
            tensors[sorted(first)[0]] = first[sorted(first)[0]]
            edit.names = [names[0], names[1], names[2], sorted(first)[0]]

        edit_shard(directory, change)

    message = broken(edit)
    gone, misshapen, alien, twice = edit.names
    assert "1 unknown (model.layers.0.mystery.weight)" in message
    assert f"1 missing ({gone})" in message
    assert f"1 misshapen ({misshapen} [" in message
    assert f"{alien} has dtype I32" in message
    assert f"{twice} is in both model-00001-of" in message


def test_a_long_list_is_capped_with_its_count(broken):
    def edit(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))

    message = broken(edit)
    assert "66 missing (model.layers.3." in message
    assert "and 58 more)" in message
    assert len(message) < 1000


def test_a_truncated_shard_is_named(broken):
    def edit(directory):
        path = sorted(directory.glob("*.safetensors"))[2]
        path.write_bytes(path.read_bytes()[:-7])

    assert "model-00003-of-" in broken(edit)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04 a zip, as pytorch_model.bin is" + bytes(100)])
def test_an_alien_file_is_named(broken, content):
    message = broken(lambda directory: sorted(directory.glob("*.safetensors"))[0].write_bytes(content))
    assert "model-00001-of-" in message
    assert "not a complete safetensors file" in message


def test_a_missing_shard_is_named(broken):
    message = broken(lambda directory: sorted(directory.glob("*.safetensors"))[0].unlink())
    assert "model-00001-of-" in message
    assert "no such file" in message


@pytest.mark.parametrize("file", ["../weights.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7, "x.bin"])
def test_an_index_may_not_leave_its_directory(broken, file):
    message = broken(lambda d: edit_index(d, lambda weight_map: weight_map.update({"model.norm.weight": file})))
    assert f"model.norm.weight is given to {file!r}" in message


def test_an_index_that_is_not_exact_is_read_as_transformers_reads_it(tmp_path, tiny_model, capsys):
    """The index determines the files, the files determine the tensors, and a note is printed."""
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")

    def change(weight_map):
        files = sorted(set(weight_map.values()))
        weight_map["model.norm.weight"] = next(f for f in files if f != weight_map["model.norm.weight"])
        weight_map["model.ghost.weight"] = files[0]
        del weight_map["model.layers.1.mlp.up_proj.weight"]

    edit_index(tmp_path, change)
    edit_shard(tmp_path, lambda tensors: tensors.update({"model.extra.weight": np.zeros((2, 2), np.float32)}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    params = load_params(open_source(str(tmp_path)), "float32")
    up_proj = params["layers"]["mlp"]["up_proj"]["weight"][1]
    np.testing.assert_array_equal(up_proj, theirs.model.layers[1].mlp.up_proj.weight.detach().numpy())
    np.testing.assert_array_equal(params["norm"]["weight"], theirs.model.norm.weight.detach().numpy())
    note = capsys.readouterr().err
    assert "1 named, and in no file (model.ghost.weight)" in note
    assert "2 in a file, and not named (model.extra.weight, model.layers.1.mlp.up_proj.weight)" in note
    assert "1 in another file (model.norm.weight)" in note


def test_a_tensor_that_only_the_index_has_is_missing(broken):
    def edit(directory):
        edit_index(directory, lambda weight_map: weight_map.update({"model.norm.weight": min(weight_map.values())}))
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            tensors.pop("model.norm.weight", None)
            save_file(tensors, path)

    assert "1 missing (model.norm.weight)" in broken(edit)


def test_a_tensor_twice_in_the_index(broken):
    def edit(directory):
        text = (directory / INDEX).read_text()
        (directory / INDEX).write_text(
            text.replace('"weight_map": {', '"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors",')
        )

    assert f"model.norm.weight is twice in {INDEX}" in broken(edit)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "\xff{"])
def test_a_broken_index_is_named(broken, text):
    assert INDEX in broken(lambda directory: (directory / INDEX).write_bytes(text.encode("latin-1")))


@pytest.mark.parametrize("text", ["", "[]", "{'model_type': 'llama'}"])
def test_a_broken_config_is_named(broken, text):
    assert "config.json" in broken(lambda directory: (directory / "config.json").write_text(text))


def test_a_bare_decoder_is_refused(tmp_path, tiny_model):
    tiny_model("llama").model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lack the prefix 'model\.'"):
        load_params(open_source(str(tmp_path)), "float32")


def test_pickled_weights_are_refused(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin but no safetensors"):
        open_source(str(tmp_path))


def test_a_model_that_cannot_be_represented_is_named_with_its_source(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: config.json: model_type 'mamba' is not supported")


def test_a_quantised_checkpoint_is_refused_by_name(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantization_config"):
        open_source(str(tmp_path))


def test_a_bad_tokenizer_is_named(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        open_source(str(tmp_path)).load_tokenizer()
