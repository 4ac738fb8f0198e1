"""The recipe of docs/recipes.md for a full model: what keeps most of a causal model's knowledge in a short conversion.

Command:   bash scripts/run.sh configs/recommended.py
           Another model or data: --config.model=... --config.dataset=...
           A base in NF4: --config.quantization=nf4
Hardware:  as configs/two_phase.py; it has not been run with Qwen3-4B-Instruct-2507.
Expect:    not measured here. configs/quickstart.py has the same attention, objective and decoding for a small model,
           with a higher learning rate and steps of 8 short examples: after 170 of them about as many exact answers as
           the causal base, in 4 passes for 16 tokens (docs/recipes.md). Full attention without the shift needs more.

Prefix attention and the logit shift leave the prompt's states and the head's meaning as the base knows them; rates of
0.3 to 1 train what a sampler meets that starts from masks alone, and CART's weights what it commits next; `steady`
commits what is sure, and the leftmost.
"""

from ml_collections import ConfigDict

from difflm_jax.config import recommended_config


def get_config() -> ConfigDict:
    config = recommended_config()
    config.output_dir = "/tmp/output/recommended"
    config.answer_padding = 16
    config.log_interval = 10
    return config
