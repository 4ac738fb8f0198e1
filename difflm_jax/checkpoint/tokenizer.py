"""The tokenizer of a Hugging Face directory, a checkpoint's or an adapter's. What tokenizer.json says is the truth."""

import importlib
import logging
import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from difflm_jax.checkpoint.safetensors import read_json
from difflm_jax.errors import UserError, one_line

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# Splits differently under every splitting rule that is in use: indented numbers, contractions, case, spaces, scripts.
_PROBE = (
    "1. a\n  2. b\n\n\t10) It's 12345,  WE'LL don't\r\n   x=f(y)**2;  ... ünïcode naïve 中文字 かな 한국어 привет ½² ﬁ "
    "e\u0301 🙂👩‍👩‍👧 camelCaseAND_snake  \n \n"
)


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a tokenizer in `directory`."""
    return any((directory / name).is_file() for name in _FILES)


def chat_template(directory: Path) -> str | None:
    """The chat template that stands in `directory` without a tokenizer."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(config).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, with its chat template. Raises `UserError` if it cannot be loaded.

    Where transformers' class for it ignores how tokenizer.json splits text, the file is used, and that is said.
    """
    configs = logging.getLogger("transformers.configuration_utils")
    level = configs.level
    configs.setLevel(logging.ERROR)  # it warns of a config.json whose model transformers does not have
    try:
        tokenizer = _as_transformers_does(directory)
        return _as_its_file_says(directory, tokenizer)
    except Exception as error:  # the libraries beneath raise anything, bare `Exception` included, for a bad file
        if missing := _missing_packages(directory):
            raise UserError(
                f"{directory}: its tokenizer is a SentencePiece file (tokenizer.model): pip install {missing}, or save "
                "it as tokenizer.json where that is installed"
            ) from error
        raise UserError(f"{directory}: its tokenizer cannot be loaded ({one_line(error)[:200]})") from error
    finally:
        configs.setLevel(level)


def _missing_packages(directory: Path) -> str:
    """What transformers lacks to read the SentencePiece file in `directory`."""
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
    # Not at the top: `AutoTokenizer` takes two seconds where PyTorch is installed, and a .gguf file does not need it.
    from transformers import AutoTokenizer, Qwen2Tokenizer

    named = directory / "tokenizer_config.json"
    if named.is_file() and read_json(named).get("tokenizer_class") == "DreamTokenizer":
        return Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True)  # which it is a copy of
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
    # The special tokens that its class brings along stay, unless they would be new to the vocabulary.
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and file.token_to_id(str(token)) is not None
    }  # fmt: skip
    said = f"note: {path}: {type(tokenizer).__name__} of transformers would split text otherwise; the file is used"
    print(said, file=sys.stderr, flush=True)
    return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True, **special)
