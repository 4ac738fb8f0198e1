#!/usr/bin/env bash
# transformers: AutoTokenizer discards the pre_tokenizer of tokenizer.json where tokenizer_config.json names
# GPT2Tokenizer and config.json a llama, and save_pretrained writes the loss. SmolLM2's own folder is such a one.
# Seen: the file splits digits one by one, the loaded tokenizer does not.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
env/bin/python - <<'END'
import json, pathlib
import tokenizers, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()
folder = pathlib.Path("model")
folder.mkdir()
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {letter: i for i, letter in enumerate([*letters, "12"])}
own = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2")]))
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
own.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
loaded = AutoTokenizer.from_pretrained(folder)
of_file, of_class = own.encode("12").tokens, loaded.tokenize("12")
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("'12' by tokenizer.json:", of_file, " by AutoTokenizer:", of_class)
assert of_file == ["1", "2"] and of_class == ["12"], "this has changed"
END
