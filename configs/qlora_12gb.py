"""Both phases of Qwen3-4B-Instruct-2507 over a base held in NF4, for one accelerator with little memory.

Command:   python -m difflm_jax.train --config=configs/qlora_12gb.py
           Another format: --config.use_qlora=false --config.quantization=int4 (or int8)
Hardware:  one TPU or GPU; the weights take 2.5 GiB (bfloat16: 7.5), the whole step of 16 rows of 768 tokens 7.7 GiB
           (7.2 with attention_kernel=cudnn) as XLA compiles it for an H100; jax takes three quarters of a GPU, which
           are 8.4 GiB of 12 GB. With remat=save_dots a step took 0.5 s of an H200, and 34 GiB.
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
