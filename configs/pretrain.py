"""The first phase: Qwen3-4B-Instruct-2507 learns to fill masks anywhere in a conversation of tulu-3.

Command:   python -m difflm_jax.train --config=configs/pretrain.py
Hardware:  an accelerator, or several: the frozen weights alone take 8 GB in bfloat16. If memory runs out, lower
           --config.batch_size and raise --config.gradient_accumulation_steps by as much: the result is the same.
           Without an accelerator use configs/quickstart.py. Weights and data come from the Hugging Face hub.
Expect:    a line every 10 steps, four evaluations, and the adapter of the best one in /tmp/output/pretrain_model, from
           which configs/sft.py continues. Memory, speed, wall time and the loss that these weights reach have not been
           measured.

The hyper-parameters are the original system's; any key can be changed with --config.key=value.
"""

from difflm_jax.config import default_config


def get_config():
    config = default_config()
    config.phases = ("pretrain",)
    config.log_interval = 10
    return config
