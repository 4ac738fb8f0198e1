"""Tests the quantised base on disk: it is reused only for the same source, and never if it is damaged."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difflm_jax.checkpoint import converted as module
from difflm_jax.checkpoint.converted import load_converted
from difflm_jax.checkpoint.hf import abstract_params, load_params
from difflm_jax.checkpoint.source import open_source
from difflm_jax.quant import QuantConfig

INT4 = QuantConfig("int4", 16)


@pytest.fixture
def source(tiny_model, tiny_tokenizer, tmp_path):
    directory = tmp_path / "model"
    tiny_model("qwen3").save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return open_source(str(directory))


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("quantization", [QuantConfig("nf4", 16), QuantConfig("nf4", 16, False), INT4], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_start_reads_what_the_first_wrote(source, tmp_path, monkeypatch, quantization, dtype):
    first = load_converted(source, dtype, quantization, tmp_path / "kept")
    assert same(first, load_params(source, dtype, quantization))
    assert len(list((tmp_path / "kept").iterdir())) == 1
    monkeypatch.setattr(module, "load_params", None)  # converting again fails
    assert same(first, load_converted(source, dtype, quantization, tmp_path / "kept"))


def test_another_format_dtype_or_source_is_another_file(source, tmp_path):
    for dtype, quantization in (("float32", INT4), ("bfloat16", INT4), ("float32", QuantConfig("int8", 16))):
        load_converted(source, dtype, quantization, tmp_path / "kept")
    path = source.path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, path)
    changed = load_converted(open_source(str(source.path)), "float32", INT4, tmp_path / "kept")
    np.testing.assert_array_equal(changed["norm"]["weight"], tensors["model.norm.weight"])
    assert len(list((tmp_path / "kept").iterdir())) == 4


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "other weights"])
def test_a_damaged_file_is_announced_and_made_again(source, tmp_path, capsys, damage):
    expected = load_converted(source, "float32", INT4, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    whole = path.read_bytes()
    if damage == "a flipped bit":
        path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 4]) + whole[-99:])
    elif damage == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        load_converted(source, "bfloat16", INT4, tmp_path / "other")
        (other,) = (tmp_path / "other").iterdir()
        shutil.copy(other, path)
    assert same(expected, load_converted(source, "float32", INT4, tmp_path / "kept"))
    assert f"{path}: is damaged" in capsys.readouterr().err
    capsys.readouterr()
    assert same(expected, load_converted(source, "float32", INT4, tmp_path / "kept"))
    assert "damaged" not in capsys.readouterr().err  # it was rewritten completely


def test_a_disk_that_refuses_costs_only_the_file(source, tmp_path, capsys):
    (tmp_path / "kept").write_text("a file where the directory should be")
    assert same(load_params(source, "float32", INT4), load_converted(source, "float32", INT4, tmp_path / "kept"))
    assert "cannot be kept" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", [None, INT4, QuantConfig("nf4", 16)], ids=str)
def test_shapes_are_known_before_anything_is_read(source, quantization):
    loaded = load_params(source, "bfloat16", quantization)
    known = abstract_params(source.config, "bfloat16", quantization)
    assert _shapes(loaded) == _shapes(known)


def _shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
