#!/usr/bin/env bash
# PEFT: where the vocabulary of the base has grown, an adapter with modules_to_save=["embed_tokens", "lm_head"] is saved
# with each of the two matrices three times: as it is, as modules_to_save.weight, and as the untrained
# original_module.weight. PEFT reads the first alone.
# Seen: 2 matrices where the vocabulary is that of the base, 6 where it has grown by 8 rows.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.23.0
cd "$folder"
env/bin/python - <<'END'
import peft, transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained("base")
config = dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
counts = {}
for rows in (32, 40):
    base = AutoModelForCausalLM.from_pretrained("base")
    base.resize_token_embeddings(rows)
    get_peft_model(base, LoraConfig(**config)).save_pretrained(f"adapter{rows}")
    with safe_open(f"adapter{rows}/adapter_model.safetensors", "np") as file:
        names = [name for name in file.keys() if "lora_" not in name]
    counts[rows] = len(names)
    print(rows, "rows:", *names)
print("peft", peft.__version__, "transformers", transformers.__version__)
assert counts == {32: 2, 40: 6}, "this has changed"
END
