"""Both phases of Qwen3-4B-Instruct-2507 over a base held in NF4, for one accelerator with little memory.

Command:   python -m difflm_jax.train --config=configs/qlora_12gb.py
           Another format: --config.use_qlora=false --config.quantization=int4 (or int8)
Hardware:  one TPU or GPU; the weights take 2.5 GiB (bfloat16: 7.5), the whole step 10.3 GiB on a TPU v6e and 8.8 GiB on
           an H100, as XLA compiles it ahead of time (16 rows of 768 tokens). It has not run on either here.
Expect:    as configs/two_phase.py, whose objective, data and hyper-parameters these are (the original system with its
           use_qlora). The quantised base is kept in output_dir/converted, so that a resumed run starts in seconds.

Any key can be changed with --config.key=value.
"""

from ml_collections import ConfigDict

from difflm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.use_qlora = True
    config.output_dir = "/tmp/output/qlora"
    config.log_interval = 10
    return config
