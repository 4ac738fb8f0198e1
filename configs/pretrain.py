"""The first phase: Qwen3-4B-Instruct-2507 learns to fill masks anywhere in a conversation of tulu-3.

Command:   python -m difflm_jax.train --config=configs/pretrain.py
Hardware:  one GPU or TPU chip of at least 16 GiB, or several: bf16 weights are 8 GB, and compiled for an H100 this step
           (16 rows of 768 tokens, remat) takes 13.9 GiB, for a v5e 2x2 4.6 GiB a chip. Without an accelerator use
           configs/quickstart.py. Weights and data come from the Hugging Face hub.
Expect:    loss and masked NLL fall from the first hundred steps on. Speed, wall time and final figures on these
           weights have not been measured.
Leaves:    /tmp/output/pretrain_model, a PEFT adapter from which configs/sft.py goes on.

The hyper-parameters are the original system's; any key can be changed with --config.key=value.
"""

from difflm_jax.config import default_config


def get_config():
    config = default_config()
    config.phases = ("pretrain",)
    config.log_interval = 10
    return config
