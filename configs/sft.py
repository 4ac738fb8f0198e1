"""The second phase on its own: the adapter that configs/pretrain.py left learns to answer.

Command:   python -m difflm_jax.train --config=configs/sft.py
           Another adapter: --config.adapter=DIRECTORY; a fresh one: --config.adapter=
Hardware:  as configs/pretrain.py.
Expect:    only tokens of the last assistant turn are hidden and scored; the best adapter is left in
           /tmp/output/sft/sft_model. Adam's moments start anew here; configs/two_phase.py keeps them. Memory, speed,
           wall time and the loss that these weights reach have not been measured.

The hyper-parameters are the original system's; any key can be changed with --config.key=value.
"""

from difflm_jax.config import default_config


def get_config():
    config = default_config()
    config.phases = ("sft",)
    config.adapter = "/tmp/output/pretrain_model"
    config.output_dir = "/tmp/output/sft"
    config.log_interval = 10
    return config
