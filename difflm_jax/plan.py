"""Says whether a run will fit, with which batch, and how long a step takes, without loading or running anything.

    python -m difflm_jax.plan --config=configs/two_phase.py [--config.model=DIR] [--chips=v5e,h100] [--mesh=1,4,1 ...]
                              [--compile] [--peak_share=0.4] [--out=FILE.json]

Only the `config.json` of the model is needed. A line for the training step of each phase and one for a generation, on
every chip and mesh. Memory, products and traffic between devices are read off the traced functions (an estimate; see
the README for how far it is off); `--compile` asks XLA's compiler for the chip instead: exact, for v5e, v6e, a100, h100
and h200 without having one, where jax[tpu] or jax's CUDA plugin is installed.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from difflm_jax.checkpoint.source import read_model_config
from difflm_jax.cli import run_command
from difflm_jax.config.files import load_config, phase_config, quantization, take_overrides
from difflm_jax.config.schema import KEYS
from difflm_jax.distributed.mesh import AXES, abstract_mesh, mesh_of, row_shards
from difflm_jax.errors import UserError, exit_with_errors
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.flops import peak_flops
from difflm_jax.ops.attention_kernels import check_kernel
from difflm_jax.planning.chips import CHIPS, GIB, Chip, absent_devices
from difflm_jax.planning.hlo import collective_bytes
from difflm_jax.planning.jobs import (
    Estimate,
    Job,
    compiled_parts,
    estimate,
    largest_batch,
    sampling_job,
    training_job,
)
from difflm_jax.training.run import check_sizes
from difflm_jax.utils.dtypes import AUTO, fastest_dtype
from difflm_jax.utils.files import check_writable, write_whole

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", "", "A .py, .yaml or .json file; without it the defaults.", flag_values=FLAGS)
flags.DEFINE_list("chips", ["this"], f"Of {', '.join(CHIPS)}, cpu and this (machine's).", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "mesh", [], "Devices along data, fsdp and tensor, as 1,4,2; may be given often; default: the config's.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("compile", False, "Compile for the chip, and report what XLA assigns.", flag_values=FLAGS)
flags.DEFINE_float("peak_share", 0.4, "Share of the chip's peak at which products run.", flag_values=FLAGS)
flags.DEFINE_float("memory_share", 0.0, "Share of a chip's memory to use; 0: what jax takes.", flag_values=FLAGS)
flags.DEFINE_enum("what", "both", ["train", "sample", "both"], "Which functions.", flag_values=FLAGS)
flags.DEFINE_integer("prompt_length", 128, "Tokens of a prompt of the generation.", flag_values=FLAGS)
flags.DEFINE_integer("max_new_tokens", 128, "Tokens of its answer.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 32, "Its forward passes.", flag_values=FLAGS)
flags.DEFINE_integer("block_length", 0, "Of its blocks (0: one block, or the model's).", flag_values=FLAGS)
flags.DEFINE_string("out", "", "A file for the same as JSON.", flag_values=FLAGS)


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""

    def split_and_run() -> int:
        overrides, others = take_overrides(argv)
        return run_command(lambda flag_values: main(flag_values, overrides), FLAGS, __doc__, others, KEYS)

    return exit_with_errors(split_and_run)


def main(flag_values: flags.FlagValues, overrides: Sequence[str]) -> None:
    """Prints the table."""
    if flag_values.out:
        check_writable(flag_values.out)
    config = load_config(flag_values.config, overrides)
    if config.dtype == AUTO:
        with config.unlocked():
            config.dtype = fastest_dtype() if set(flag_values.chips) <= {"cpu", "this"} else "bfloat16"
    if not 0 < flag_values.peak_share <= 1 or not 0 <= flag_values.memory_share <= 1:
        raise UserError("--peak_share must be in (0, 1], --memory_share in [0, 1]")
    chips = [_chip(name, flag_values.memory_share) for name in flag_values.chips]
    for chip in chips:
        check_kernel(config.attention_kernel, config.dtype, chip.platform)
    model_config = read_model_config(config.model, config.revision or None)
    meshes = [_sizes(text) for text in flag_values.mesh] or [tuple(max(1, config.mesh[axis]) for axis in AXES)]
    for sizes in meshes:
        check_sizes(config, model_config, quantization(config), abstract_mesh(*sizes))
    print(_header(config, model_config, flag_values), flush=True)
    records = []
    for sizes in meshes:
        for name in _jobs(config, flag_values.what):
            described = _Described(config, model_config, sizes, name, flag_values)
            for chip in chips:
                record = _compiled(described, chip) if flag_values.compile else _estimated(described, chip)
                records.append(record)
                print(_row(record), flush=True)
    if flag_values.out:
        write_whole(flag_values.out, json.dumps(records, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class _Described:
    """One function of a run on a mesh, whatever the chip."""

    config: ConfigDict
    model_config: ModelConfig
    sizes: tuple[int, int, int]
    name: str  # a phase, or "sampling"
    flag_values: flags.FlagValues
    cache: dict[tuple[int, bool], Estimate] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        config = self.config if self.name == "sampling" else phase_config(self.config, self.name)
        return config.batch_size

    @property
    def layers(self) -> int:
        return self.model_config.num_layers

    def job(self, mesh: Any, rows: int, on_cpu: bool) -> Job:
        if self.name != "sampling":
            return training_job(self.config, self.name, self.model_config, mesh, rows, on_cpu)
        given = self.flag_values
        lengths = (given.prompt_length, given.max_new_tokens, given.steps, given.block_length or None)
        return sampling_job(self.config, self.model_config, mesh, rows, *lengths, on_cpu)

    def estimate(self, rows: int, on_cpu: bool) -> Estimate:
        if (rows, on_cpu) not in self.cache:
            mesh = abstract_mesh(*self.sizes)
            self.cache[rows, on_cpu] = estimate(self.job(mesh, rows, on_cpu), mesh, self.layers, on_cpu)
        return self.cache[rows, on_cpu]


def _estimated(described: _Described, chip: Chip) -> dict[str, Any]:
    capacity, on_cpu = chip.memory * chip.usable, chip.platform == "cpu"
    found = described.estimate(described.rows, on_cpu)
    unit = row_shards(abstract_mesh(*described.sizes))
    most = largest_batch(lambda rows: described.estimate(rows, on_cpu).total, capacity, unit)
    return {**_record(described, chip, found.parts, found), "largest_batch_size": most}


def _compiled(described: _Described, chip: Chip) -> dict[str, Any]:
    count = math.prod(described.sizes)
    if chip.name in CHIPS:
        devices = absent_devices(chip, count)
    elif (devices := jax.devices()[:count]) and len(devices) < count:
        raise UserError(f"--compile: there are {len(devices)} devices here, and the mesh has {count}")
    mesh = mesh_of(np.array(devices).reshape(described.sizes))
    start = time.perf_counter()
    on_cpu = chip.platform == "cpu"
    job = described.job(mesh, described.rows, on_cpu)
    parts, compiled = compiled_parts(job)
    seconds = time.perf_counter() - start
    moved = collective_bytes(compiled.as_text(), job.loop_trips)
    found = described.estimate(described.rows, on_cpu)
    named = {name: size for name, size in found.parts.items() if name in ("weights", "adapters", "moments")}
    rest = {"batch": parts.pop("arguments") - sum(named.values()), **parts}
    return {
        **_record(described, chip, {**named, **rest}, found),
        "collective_results_gib": {kind: round(size / GIB, 3) for kind, size in sorted(moved.items())},
        "compile_seconds": round(seconds, 1),
    }


def _record(described: _Described, chip: Chip, parts: dict[str, int], found: Estimate) -> dict[str, Any]:
    total, capacity = sum(parts.values()), chip.memory * chip.usable
    seconds = {"products": None, "memory": None, "links": None}
    if chip.flops:
        seconds["products"] = found.flops / (chip.flops * described.flag_values.peak_share)
    if chip.bandwidth:
        seconds["memory"] = found.product_bytes / chip.bandwidth
    if chip.link:
        seconds["links"] = found.link_bytes / chip.link
    known = {name: value for name, value in seconds.items() if value is not None}
    bound = max(known, key=known.get) if known else None
    return {
        "function": described.name,
        "chip": chip.name,
        "mesh": list(described.sizes),
        "rows": described.rows,
        "gib": {name: round(size / GIB, 3) for name, size in parts.items()},
        "total_gib": round(total / GIB, 2),
        "capacity_gib": round(capacity / GIB, 2),
        "fits": total <= capacity,
        "teraflop": round(found.flops / 1e12, 3),
        "link_gib": round(found.link_bytes / GIB, 3),
        "seconds": round(known[bound], 4) if bound else None,
        "bound_by": bound,
    }


def _row(record: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {size:.2f}" for name, size in record["gib"].items() if size >= 0.005)
    fits = "fits" if record["fits"] else "DOES NOT FIT"
    largest = f", largest batch_size {record['largest_batch_size']}" if "largest_batch_size" in record else ""
    time_of = f"{record['seconds']:.3g} s ({record['bound_by']})" if record["seconds"] else "speed not known"
    moved = f", {record['link_gib']:.2f} GiB over links" if record["link_gib"] else ""
    mesh = ",".join(map(str, record["mesh"]))
    return (
        f"{record['function']:<9} {record['chip']:<5} mesh {mesh:<6} {record['total_gib']:>6.2f} of "
        f"{record['capacity_gib']:.1f} GiB a device: {fits}{largest}\n"
        f"          {parts}\n"
        f"          {record['teraflop']:.1f} TFLOP a device{moved}, {time_of}"
    )


def _header(config: ConfigDict, model_config: ModelConfig, flag_values: flags.FlagValues) -> str:
    held = quantization(config)
    return (
        f"{config.model}: {model_config.num_layers} layers of {model_config.hidden_size}, "
        f"{held.format if held else config.dtype} base, {config.attention} attention by {config.attention_kernel}, "
        f"remat {config.remat}; steps of {config.gradient_accumulation_steps} x {config.batch_size} rows of "
        f"{config.max_length} tokens; "
        f"{'compiled' if flag_values.compile else 'estimated'}, products at {flag_values.peak_share:g} of the peak"
    )


def _jobs(config: ConfigDict, what: str) -> list[str]:
    phases = [] if what == "sample" else list(config.phases)
    return phases if what == "train" else [*phases, "sampling"]


def _sizes(text: str) -> tuple[int, int, int]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise UserError(f"--mesh={text}: must be three integers") from error
    if len(sizes) != 3 or min(sizes) < 1:
        raise UserError(f"--mesh={text}: must be three integers above 0: data, fsdp, tensor")
    return sizes


def _chip(name: str, memory_share: float) -> Chip:
    if name in CHIPS:
        chip = CHIPS[name]
    elif name in ("cpu", "this"):
        chip = _this_machine("cpu" if name == "cpu" else jax.default_backend())
    else:
        raise UserError(f"--chips={name}: is not one of {', '.join((*CHIPS, 'cpu', 'this'))}")
    return dataclasses.replace(chip, usable=memory_share) if memory_share else chip


def _this_machine(platform: str) -> Chip:
    """The first device here; what a CPU can do is measured by a product of matrices."""
    device = jax.devices(platform)[0]
    if platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip("cpu", memory, 0.9, _measured_flops(device), None, None, "cpu")
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    kind = device.device_kind
    return Chip(kind, limit, 1.0, peak_flops(kind), None, None, "tpu" if platform == "tpu" else "cuda")


def _measured_flops(device: jax.Device, size: int = 1024) -> float:
    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


if __name__ == "__main__":
    sys.exit(command(sys.argv))
