"""Loads the tokenizer of a checkpoint or an adapter directory. tokenizer.json has the last word."""

import importlib
import logging
import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from difflm_jax.checkpoint.safetensors import read_json
from difflm_jax.errors import UserError, one_line

# Classes that tokenizer.json describes completely: what is saved of a tokenizer by transformers 5 and before.
_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# A text that all splitting rules in use split differently: indented numbers, contractions, case, spaces, scripts.
_PROBE = (
    "1. a\n  2. b\n\n\t10) It's 12345,  WE'LL don't\r\n   x=f(y)**2;  ... ünïcode naïve 中文字 かな 한국어 привет ½² ﬁ "
    "e\u0301 🙂👩‍👩‍👧 camelCaseAND_snake  \n \n"
)


def has_tokenizer(directory: Path) -> bool:
    """Whether `directory` has a tokenizer."""
    return any((directory / name).is_file() for name in _FILES)


def chat_template(directory: Path) -> str | None:
    """Returns the chat template in `directory` without loading a tokenizer; None if there is none."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(config).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in `directory`, with its chat template. Raises `UserError` if it cannot be loaded.

    If transformers' class for it ignores how tokenizer.json splits text, the file is used and a note is printed.
    """
    configs = logging.getLogger("transformers.configuration_utils")
    level = configs.level
    configs.setLevel(logging.ERROR)  # it warns if transformers does not know the model in config.json
    try:
        tokenizer = _as_transformers_does(directory)
        return _as_its_file_says(directory, tokenizer)
    except Exception as error:  # for a bad file, the libraries raise anything, even bare `Exception`
        if missing := _missing_packages(directory):
            raise UserError(
                f"{directory}: its tokenizer is a SentencePiece file (tokenizer.model): pip install {missing}, or save "
                "it as tokenizer.json where that is installed"
            ) from error
        raise UserError(f"{directory}: its tokenizer cannot be loaded ({one_line(error)[:200]})") from error
    finally:
        configs.setLevel(level)


def _missing_packages(directory: Path) -> str:
    """Returns the packages that transformers lacks to read the SentencePiece file in `directory`; "" if none."""
    if (directory / "tokenizer.json").is_file() or not (directory / "tokenizer.model").is_file():
        return ""
    missing = []
    for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    return " ".join(missing)


def _as_transformers_does(directory: Path) -> PreTrainedTokenizerBase:
    config = directory / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.is_file() else None
    is_plain = named in _PLAIN and (directory / "tokenizer.json").is_file()
    if is_plain and not (directory / "config.json").is_file():  # without a config.json the class decides, not the model
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    # Imported here: `AutoTokenizer` takes two seconds and 200 MB if PyTorch is installed.
    from transformers import AutoTokenizer, Qwen2Tokenizer

    if named == "DreamTokenizer":
        return Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True)  # DreamTokenizer is a copy of it
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def _as_its_file_says(directory: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return tokenizer
    file = Tokenizer.from_file(str(path))
    file.no_padding()
    file.no_truncation()
    expected = file.encode(_PROBE, add_special_tokens=False).ids
    if tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"] == expected:
        return tokenizer
    # Keep the special tokens of the class, unless they are not in the vocabulary.
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and file.token_to_id(str(token)) is not None
    }  # fmt: skip
    said = f"note: {path}: {type(tokenizer).__name__} of transformers would split text otherwise; the file is used"
    print(said, file=sys.stderr, flush=True)
    return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True, **special)
