#!/usr/bin/env bash
# transformers: reading a GGUF file of a llama, qwen3 or gemma3 drops its RoPE scaling: the keys rope.scaling.* and the
# tensor rope_freqs.weight, in which llama.cpp keeps that of Llama 3.1. No warning is given; the logits are others.
# Seen: linear scaling by 8, YaRN by 4 and frequency factors all become rope_type "default".
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 gguf==0.19.0 torch==2.13.0
cd "$folder"
env/bin/python - <<'END'
import importlib.metadata
import warnings

import numpy as np
import transformers
from gguf import GGUFWriter, RopeScalingType
from transformers import AutoConfig

transformers.logging.set_verbosity_error()


def written(name, architecture, scaling=None, factors=False):
    writer = GGUFWriter(name, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if scaling:
        writer.add_rope_scaling_type(scaling[0])
        writer.add_rope_scaling_factor(scaling[1])
        writer.add_rope_scaling_orig_ctx_len(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_tensor("token_embd.weight", np.zeros((4, 16), np.float32))
    if factors:
        writer.add_tensor("rope_freqs.weight", np.array([1, 1, 4, 8], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return name


files = {
    "llama, linear by 8": written("linear.gguf", "llama", (RopeScalingType.LINEAR, 8.0)),
    "qwen3, YaRN by 4": written("yarn.gguf", "qwen3", (RopeScalingType.YARN, 4.0)),
    "llama, rope_freqs.weight": written("freqs.gguf", "llama", factors=True),
}
with warnings.catch_warnings(record=True) as given:
    warnings.simplefilter("always")
    found = {name: AutoConfig.from_pretrained(".", gguf_file=file).rope_parameters for name, file in files.items()}
print("transformers", transformers.__version__, "gguf", importlib.metadata.version("gguf"))
for name, rope in found.items():
    print(f"{name}: {rope}")
print("warnings:", [str(each.message) for each in given if "rope" in str(each.message).lower()])
assert all(rope["rope_type"] == "default" for rope in found.values()), "this has changed"
END
