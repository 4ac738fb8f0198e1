"""Both phases in one run: Qwen3-4B-Instruct-2507 on tulu-3, first masks anywhere, then masks in answers.

Command:   python -m difflm_jax.train --config=configs/two_phase.py
           Shorter: --config.pretrain.max_steps=1000 --config.sft.max_steps=1000
Hardware:  as configs/pretrain.py.
Expect:    the second phase continues with the adapters and Adam moments of the first and starts the schedule again;
           pretrain_model and sft_model are left in /tmp/output/two_phase. Memory, speed, wall time and the loss that
           these weights reach have not been measured.

The hyper-parameters are the original system's; any key can be changed with --config.key=value.
"""

from difflm_jax.config import default_config


def get_config():
    config = default_config()
    config.phases = ("pretrain", "sft")
    config.output_dir = "/tmp/output/two_phase"
    config.log_interval = 10
    return config
