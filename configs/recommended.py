"""The recipe of docs/recipes.md for a full model: what keeps most of a causal model's knowledge in a short conversion.

Command:   bash scripts/run.sh configs/recommended.py
           Another model or data: --config.model=... --config.dataset=...
           A base in NF4: --config.quantization=nf4
Hardware:  as configs/two_phase.py for Qwen3-4B-Instruct-2507, plus one forward pass a step (about 1.2 times the time of
           the quickstart's step on a CPU). It has been run as configs/quickstart.py with SmolLM2-135M only.
Expect:    masked NLL at once near the causal base's own NLL of the answers at low mask rates, and falling; answers from
           the first hundred steps on. With `full` attention and no shift a model of this kind starts from ruins.

Prefix attention and the logit shift leave the prompt's states and the head's meaning as the base knows them. Three
quarters of the examples are trained on what the model's own decoding leaves open, the rest on random masks at rates up
to 1, which a sampler meets that starts from masks alone. `steady` commits what is sure and goes on from the left.
"""

from ml_collections import ConfigDict

from difflm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.output_dir = "/tmp/output/recommended"
    config.attention = "prefix"
    config.logit_shift = True
    config.mask_rate = "row"
    config.min_mask_probability = 0.3
    config.max_mask_probability = 1.0
    config.loss_tokens = "masked"
    config.on_policy = 0.75
    config.answer_padding = 16
    config.algorithm = "steady"
    config.log_interval = 10
    return config
