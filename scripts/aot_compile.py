"""Compiles the training step and a generation for TPUs or GPUs that are not there, and prints their memory.

    python scripts/aot_compile.py --config_json=PATH/config.json --platform=tpu --topology=v6e:2x2 --devices=1
                                  [--quantization=nf4] [--batch_size=16 --max_length=768] [--remat=full]

Nothing is loaded and nothing runs: shapes come from a `config.json`. A CPU-only machine with `jax[tpu]` compiles for
any TPU topology; with `jax-cuda12-plugin`, `jax-cuda12-pjrt` and `nvidia-cuda-nvcc-cu12` for an H100. GiB are 2^30
bytes a device: arguments (weights, adapters, moments, batch) and temporaries, as XLA's buffer assignment has them.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from difflm_jax.checkpoint.hf import abstract_params
from difflm_jax.config import default_config
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.denoiser import generate
from difflm_jax.diffusion.sampler import Plan
from difflm_jax.lora import LoraConfig, init_lora
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig
from difflm_jax.training.mesh import DATA_AXIS, batch_sharding, replicated
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step

# What XLA must know of an H100 SXM to compile without one (NVIDIA's H100 data sheet; compute capability 9.0).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_json", type=Path, required=True)
    parser.add_argument("--platform", choices=("tpu", "cuda"), default="tpu")
    parser.add_argument("--topology", default="v6e:2x2", help="TPU only")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=768)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--what", choices=("train", "sample", "both"), default="both")
    options = parser.parse_args()
    mesh = Mesh(np.array(_devices(options)[: options.devices]), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    config = ModelConfig.from_hf(json.loads(options.config_json.read_text(encoding="utf-8")))
    quantization = QuantConfig(options.quantization) if options.quantization else None
    params = _placed(abstract_params(config, jnp.bfloat16, quantization), replicated(mesh))
    jobs = {"train": _train_step, "sample": _sampling}
    for name, job in jobs.items():
        if options.what in (name, "both"):
            start = time.perf_counter()
            compiled = job(config, params, mesh, options).compile()
            _report(name, compiled, params, options, time.perf_counter() - start)


def _devices(options: argparse.Namespace) -> list:
    if options.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_H100, topology="1x1x1"
    ).devices


def _train_step(config: ModelConfig, params: dict, mesh: Mesh, options: argparse.Namespace) -> jax.stages.Lowered:
    """The original system's pretraining step: every real token is scored."""
    settings = default_config()
    model = _model(config, options.remat)
    optimizer = make_optimizer(settings)
    step = make_train_step(
        StepOptions(model, Corruption(), settings.loss_chunk), optimizer, learning_rate_schedule(settings, 1000), mesh
    )
    lora = _lora(config, params, model.lora)
    state = _placed(TrainState(lora, jax.eval_shape(optimizer.init, lora)), replicated(mesh))
    shape = (1, options.batch_size)
    tokens, row = jax.ShapeDtypeStruct((*shape, options.max_length), jnp.int32), jax.ShapeDtypeStruct(shape, jnp.int32)
    answers = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    batch = _placed(CleanBatch(tokens, row, answers, row, row, row), batch_sharding(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key, index = _placed((key, jax.ShapeDtypeStruct((), jnp.int32)), replicated(mesh))
    return step.lower(params, state, batch, key, index)


def _sampling(config: ModelConfig, params: dict, mesh: Mesh, options: argparse.Namespace) -> jax.stages.Lowered:
    """A generation of 128 tokens in 32 passes for a batch of prompts of 128 tokens."""
    model = _model(config, "none")
    variables = {"params": params, "lora": _placed(_lora(config, params, model.lora), replicated(mesh))}
    tokens = jax.ShapeDtypeStruct((options.batch_size, 256), jnp.int32)
    valid, row = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_), jax.ShapeDtypeStruct(tokens.shape[:1], jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), options.batch_size))
    tokens, valid, row, keys = _placed((tokens, valid, row, keys), replicated(mesh))
    plan = Plan(128, 4, 32, 8)
    return generate.lower(model, variables, False, plan, (0,), tokens, valid, valid, row, keys)


def _model(config: ModelConfig, remat: str) -> Transformer:
    lora = LoraConfig(lora_dropout=0.05)
    return Transformer(config, lora=lora, mask_token_id=config.vocab_size - 1, dtype=jnp.bfloat16, remat=remat)


def _lora(config: ModelConfig, params: dict, lora_config: LoraConfig) -> dict:
    mask_row = jax.ShapeDtypeStruct((config.hidden_size,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, p, row: init_lora(k, p, lora_config, row), key, params, mask_row)


def _placed(tree, sharding: NamedSharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _report(
    name: str, compiled: jax.stages.Compiled, params: dict, options: argparse.Namespace, seconds: float
) -> None:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    gib = {
        "weights": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }
    record = {
        "step": name,
        "target": options.topology if options.platform == "tpu" else "H100",
        "devices": options.devices,
        "quantization": options.quantization or "bfloat16",
        "rows": options.batch_size,
        "length": options.max_length,
        "remat": options.remat,
        "gib": {key: round(value / 2**30, 2) for key, value in gib.items()},
        "bytes_accessed_gib": round(cost.get("bytes accessed", 0) / 2**30, 1),
        "compile_seconds": round(seconds, 1),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
