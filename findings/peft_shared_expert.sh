#!/usr/bin/env bash
# PEFT: in a GLM-4.5 MoE, target_modules=["shared_experts.gate_proj", "shared_experts.up_proj", ...] adapts the routed
# experts of every layer (as target_parameters), and not the shared ones: of each name the last part counts.
# Seen: no factor of shared experts, and factors of all routed ones.
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
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, n_routed_experts=4)
layers = dict(first_k_dense_replace=0, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
targets = [f"shared_experts.{name}_proj" for name in ("gate", "up", "down")]
model = get_peft_model(Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **layers)), LoraConfig(target_modules=targets))
trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
print("asked for:", *targets)
print("trained:", *trained)
print("peft", peft.__version__, "transformers", transformers.__version__)
assert trained and not any("shared_experts" in name for name in trained), "this has changed"
assert all(".mlp.experts." in name for name in trained), "this has changed"
END
