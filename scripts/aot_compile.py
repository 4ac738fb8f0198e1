"""Compiles the training step and a generation for TPUs or GPUs that are not there, and prints their memory.

    python scripts/aot_compile.py --config_json=PATH/config.json --platform=tpu --topology=v6e:2x2 --mesh=1,4,1
                                  [--quantization=nf4] [--batch_size=16 --max_length=768] [--remat=full]

Nothing is loaded and nothing runs: shapes come from a `config.json`. A CPU-only machine with `jax[tpu]` compiles for
any TPU topology; with `jax-cuda12-plugin`, `jax-cuda12-pjrt` and `nvidia-cuda-nvcc-cu12` for an H100. GiB are 2^30
bytes a device: arguments (weights, adapters, moments, batch) and temporaries, as XLA's buffer assignment has them.
"""

import argparse
import json
import math
import re
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
from difflm_jax.diffusion.denoiser import Canvas, generate
from difflm_jax.diffusion.options import sampling_options
from difflm_jax.diffusion.sampler import Plan
from difflm_jax.lora import LoraConfig, init_lora
from difflm_jax.mesh import AXES, abstract, batch_sharding, check_model, rows_spec
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig
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
    parser.add_argument("--mesh", default="1,1,1", help="devices along data, fsdp and tensor")
    parser.add_argument("--quantization", default="")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=768)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--what", choices=("train", "sample", "both"), default="both")
    options = parser.parse_args()
    sizes = tuple(map(int, options.mesh.split(",")))
    devices = np.array(_devices(options)[: math.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    config = ModelConfig.from_hf(json.loads(options.config_json.read_text(encoding="utf-8")))
    quantization = QuantConfig(options.quantization) if options.quantization else None
    check_model(config, quantization.block_size if quantization else 1, mesh)
    params = abstract(abstract_params(config, jnp.bfloat16, quantization), mesh)
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
    state = abstract(TrainState(lora, jax.eval_shape(optimizer.init, lora)), mesh)
    shape = (1, options.batch_size)
    tokens, row = jax.ShapeDtypeStruct((*shape, options.max_length), jnp.int32), jax.ShapeDtypeStruct(shape, jnp.int32)
    answers = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    batch = _placed(jax.eval_shape(CleanBatch.of_rows, tokens, row, answers, row, row, row), batch_sharding(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key, index = abstract((key, jax.ShapeDtypeStruct((), jnp.int32)), mesh)
    return step.lower(params, state, batch, key, index)


def _sampling(config: ModelConfig, params: dict, mesh: Mesh, options: argparse.Namespace) -> jax.stages.Lowered:
    """A generation of 128 tokens, in four blocks and 32 passes, for a batch of prompts of 128 tokens."""
    model = _model(config, "none")
    variables = {"params": params, "lora": abstract(_lora(config, params, model.lora), mesh)}
    tokens = jax.ShapeDtypeStruct((options.batch_size, 256), jnp.int32)
    valid, row = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_), jax.ShapeDtypeStruct(tokens.shape[:1], jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), options.batch_size))
    plan = Plan(128, 4, 32, 8)
    quotas = jax.ShapeDtypeStruct((options.batch_size, plan.num_blocks, plan.steps_per_block), jnp.int32)
    canvas = _placed(Canvas(tokens, valid, valid, row, quotas, keys), NamedSharding(mesh, rows_spec(leading=0)))
    sampling = sampling_options(model.attention, "confidence", {})
    return generate.lower(model, variables, False, plan, (0,), canvas, sampling, mesh)


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
        "weights": sum(_bytes_of_a_device(leaf) for leaf in jax.tree.leaves(params)),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }
    record = {
        "step": name,
        "target": options.topology if options.platform == "tpu" else "H100",
        "mesh": options.mesh,
        "quantization": options.quantization or "bfloat16",
        "rows": options.batch_size,
        "length": options.max_length,
        "remat": options.remat,
        "gib": {key: round(value / 2**30, 2) for key, value in gib.items()},
        "bytes_accessed_gib": round(cost.get("bytes accessed", 0) / 2**30, 1),
        "collective_gib": collective_gib(compiled.as_text()),
        "compile_seconds": round(seconds, 1),
    }
    print(json.dumps(record), flush=True)


def _bytes_of_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def collective_gib(text: str) -> dict[str, float]:
    """GiB that a device receives or reduces in one step, by kind of collective: results, times the trips of the loops
    around them (a loop whose trips are not known, that over chunks of the loss, counts once)."""
    trips, inside, name = {}, {}, "ENTRY"
    moved: dict[tuple[str, str], int] = {}
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        if body := re.search(r"body=%([\w.-]+)", line):
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            trips[body[1]], inside[body[1]] = int(known[1]) if known else 1, name
        for called in re.findall(r"(?:to_apply|calls|branch_computations)=\{?%([\w.-]+)", line):
            inside.setdefault(called, name)
        if kind := re.search(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\(", line):
            shapes = re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", line.split(kind[0])[0])
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) * _ITEM[dtype] for dtype, dims in shapes]
            moved[name, kind[1]] = moved.get((name, kind[1]), 0) + (max(sizes) if kind[2] else sum(sizes))
    totals: dict[str, float] = {}
    for (at, kind), size in moved.items():
        while at in inside:
            size, at = size * trips.get(at, 1), inside[at]
        totals[kind] = totals.get(kind, 0.0) + size / 2**30
    return {kind: round(total, 3) for kind, total in totals.items()}


_ITEM = {"u8": 1, "s8": 1, "u16": 2, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8}


if __name__ == "__main__":
    main()
