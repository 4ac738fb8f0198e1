#!/usr/bin/env bash
# transformers: a checkpoint of the library's own model_type with a class of its own in auto_map (Stable-DiffCoder:
# model_type llama, masked diffusion) opens without trust_remote_code as the library's causal class, without a word.
# Seen: no prompt, no warning; LlamaForCausalLM, which generates from left to right under a causal mask.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0
cd "$folder"
env/bin/python - > out.txt 2> err.txt <<'END'
import json
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
)
LlamaForCausalLM(config).save_pretrained("model")
with open("model/config.json") as file:
    saved = json.load(file)
saved["architectures"] = ["StableDiffcoderForCausalLM"]
saved["auto_map"] = {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"}
with open("model/config.json", "w") as file:
    json.dump(saved, file)
model = AutoModelForCausalLM.from_pretrained("model")
print("transformers", transformers.__version__)
print("named in the config:", saved["architectures"][0], "- opened as:", type(model).__name__)
assert type(model) is LlamaForCausalLM, "this has changed"
END
cat out.txt
if grep -iq "remote\|auto_map\|diffcoder" err.txt; then
    echo "a warning is given now:"
    cat err.txt
    exit 1
fi
echo "warnings about it: none"
