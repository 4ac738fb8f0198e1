#!/usr/bin/env bash
# transformers: apply_chat_template removes the keys of a message whose value is None, so that a template that asks
# for message['content'] is none (as DeepSeek-R1-Distill's does for tool calls) sees no such key.
# Seen: the template finds no 'content', although the message has one.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$folder"
env/bin/python - <<'END'
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
tokenizer.chat_template = "{% for m in messages %}{{ 'content' in m }}{% endfor %}"
call = {"type": "function", "function": {"name": "f", "arguments": {}}}
message = {"role": "assistant", "content": None, "tool_calls": [call]}
shown = tokenizer.apply_chat_template([message], tokenize=False)
print("transformers", transformers.__version__)
print("'content' in the message:", "content" in message, " in the template:", shown)
assert shown == "False", "this has changed"
END
