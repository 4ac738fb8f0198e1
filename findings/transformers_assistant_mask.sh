#!/usr/bin/env bash
# transformers: return_assistant_tokens_mask with a chat template that has no {% generation %} block returns masks of
# zeros after a warning, so that a loss masked by it is over nothing.
# Seen: assistant_masks of zeros only.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$folder"
env/bin/python - <<'END'
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
own = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
found = tokenizer.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
)
print("transformers", transformers.__version__)
print("assistant_masks:", found["assistant_masks"])
assert len(found["assistant_masks"]) > 0 and not any(found["assistant_masks"]), "this has changed"
END
