#!/usr/bin/env bash
# PEFT and transformers: a sound adapter with a trained embedding row (trainable_token_indices) of a model with tied
# embeddings is reported MISSING ('newly initialized') when plain transformers loads it, although the logits are those
# of PEFT.
# Seen: a report of missing adapter weights, and equal logits.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.23.0
cd "$folder"
env/bin/python - <<'END'
import io, logging, torch, peft, transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained("base")
base = AutoModelForCausalLM.from_pretrained("base")
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3], init_lora_weights=False))
with torch.no_grad():
    for name, weight in model.named_parameters():
        if "trainable_tokens_delta" in name:
            weight.add_(1.0)
model.save_pretrained("adapter")
tokens = torch.tensor([[1, 2, 3]])
wanted = model.eval()(tokens).logits
said = io.StringIO()
logger = logging.getLogger("transformers")
logger.addHandler(logging.StreamHandler(said))
logger.setLevel(logging.WARNING)
again = AutoModelForCausalLM.from_pretrained("adapter").eval()
difference = float((again(tokens).logits - wanted).abs().max())
reported = "MISSING" in said.getvalue() or "newly initialized" in said.getvalue()
print("peft", peft.__version__, "transformers", transformers.__version__)
print("reported as missing:", reported, " largest difference of logits:", difference)
assert reported and difference < 1e-5, "this has changed"
END
