"""Tests tokenizers of Hugging Face directories: tokenizer.json decides, and `tokenizers` is the oracle."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from difflm_jax.checkpoint.tokenizer import load_tokenizer
from difflm_jax.errors import UserError
from tests.byte_tokenizer import byte_tokenizer

TEXT = "1. a\n  2. b, 3rd of 12345"
MERGES = (("Ċ", "Ġ"), ("ĊĠ", "Ġ"), ("1", "2"))


@pytest.fixture
def folder(tmp_path):
    """`folder(tokenizer_class, model_type)`: a directory whose tokenizer.json splits digits one by one."""

    def write(tokenizer_class: str, model_type: str):
        tokenizer = byte_tokenizer(MERGES)
        rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
        tokenizer.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": tokenizer_class}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type"),
    [
        ("GPT2Tokenizer", "llama"),
        ("GPT2Tokenizer", "qwen3"),
        ("Qwen2Tokenizer", "qwen2"),
        ("TokenizersBackend", "qwen2"),
    ],
)
def test_text_is_split_as_tokenizer_json_says_where_transformers_discards_its_rule(
    folder, tokenizer_class, model_type, capsys
):
    """The folders of SmolLM2 and OLMo are of the first kind (transformers 5.23)."""
    path = folder(tokenizer_class, model_type)
    expected = Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    theirs = AutoTokenizer.from_pretrained(path)
    assert theirs(TEXT)["input_ids"] != expected  # otherwise there is nothing to fix
    ours = load_tokenizer(path)
    assert ours(TEXT)["input_ids"] == expected
    assert "the file is used" in capsys.readouterr().err
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token) and len(ours) == 256 + 3 + 4
    assert ours.chat_template == theirs.chat_template
    ours.save_pretrained(path / "saved")  # saving does not lose it either
    assert AutoTokenizer.from_pretrained(path / "saved")(TEXT)["input_ids"] == expected


def test_a_tokenizer_that_transformers_reads_right_stays_of_its_class(folder, capsys):
    path = folder("TokenizersBackend", "llama")
    assert type(load_tokenizer(path)) is type(AutoTokenizer.from_pretrained(path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_the_tokenizer_of_an_adapter_is_that_of_transformers_and_does_not_wait_for_pytorch(folder, tokenizer_class):
    path = folder(tokenizer_class, "llama")
    (path / "config.json").unlink()  # an adapter has none
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.init_kwargs == theirs.init_kwargs
    assert ours.chat_template == theirs.chat_template
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    code = (
        "import sys; from pathlib import Path; from difflm_jax.checkpoint.tokenizer import load_tokenizer; "
        "load_tokenizer(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_sentencepiece_file_alone_names_the_package_that_is_missing(tmp_path, monkeypatch):
    """transformers' own message mentions tiktoken instead."""
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for module in ("sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"SentencePiece file \(tokenizer.model\): pip install sentencepiece protobuf"):
        load_tokenizer(tmp_path)
