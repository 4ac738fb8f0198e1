"""Estimates whether a run fits, with which batch, and how long a step takes, without loading or running it.

    python -m difflm_jax.plan --config=configs/two_phase.py [--config.model=DIR] [--chips=v5e,h100] [--mesh=1,4,1 ...]
                              [--compile] [--peak_share=0.4] [--out=FILE.json]

The model needs only its `config.json`; the shapes of common models are known by name. There is a line for the training
step of each phase and one for a generation, on every chip and mesh. If data and tokenizer are files of this machine,
steps have the lengths of the data, and the time of the whole run is given (--nolengths: rows of max_length). Memory and
time are an estimate (docs/planning.md says how far it is off). `--compile` asks the compiler for the chip instead. That
is exact; v5e, v6e, a100, h100 and h200 need not be there if jax[tpu] or jax's CUDA plugin is installed.
"""

import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
from difflm_jax.models.flops import parameters, peak_flops
from difflm_jax.ops.attention_kernels import check_kernel
from difflm_jax.planning.chips import CHIPS, GIB, Chip, absent_devices, apple_chip
from difflm_jax.planning.estimate import Estimate, Step, largest_batch, sampling_estimate
from difflm_jax.planning.hlo import collective_bytes
from difflm_jax.planning.jobs import Generation, Job, compiled_parts, sampling_job, training_job
from difflm_jax.planning.lengths import Steps, data_at_hand, read_steps
from difflm_jax.planning.models import known_shape
from difflm_jax.training.run import check_sizes, open_configured
from difflm_jax.utils.dtypes import AUTO, fastest_dtype
from difflm_jax.utils.files import check_writable, write_whole
from difflm_jax.view.tables import print_table

_SAMPLING = "sampling"

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", "", "A .py, .yaml or .json file; without it the defaults.", flag_values=FLAGS)
flags.DEFINE_list(
    "chips", ["this"], f"Of {', '.join(CHIPS)}, m16 (an M-series of 16 GB), cpu, this.", flag_values=FLAGS
)
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
flags.DEFINE_bool("lengths", True, "Take lengths from the data where they are files here.", flag_values=FLAGS)
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
    model_config = _model_config(config)
    meshes = [_sizes(text) for text in flag_values.mesh] or [tuple(max(1, config.mesh[axis]) for axis in AXES)]
    for sizes in meshes:
        check_sizes(config, model_config, quantization(config), abstract_mesh(*sizes))
    steps = _steps(config, _jobs(config, flag_values.what), flag_values.lengths)
    print(_header(config, model_config, flag_values, steps), flush=True)
    records = []
    for sizes in meshes:
        for name in _jobs(config, flag_values.what):
            described = _Described(config, model_config, sizes, name, flag_values, steps.get(name))
            records += [
                _compiled(described, chip) if flag_values.compile else _estimated(described, chip) for chip in chips
            ]
    _print(records)
    if flag_values.out:
        write_whole(flag_values.out, json.dumps(records, indent=2) + "\n")


def _model_config(config: ConfigDict) -> ModelConfig:
    known = None if Path(config.model).expanduser().exists() else known_shape(config.model)
    return known or read_model_config(config.model, config.revision or None)


def _steps(config: ConfigDict, names: Sequence[str], wanted: bool) -> dict[str, Steps]:
    """Returns the steps of each phase whose data can be read."""
    phases = [name for name in names if name != _SAMPLING and wanted and data_at_hand(config, name)]
    lm = open_configured(config) if phases else None
    return {name: read_steps(config, name, lm) for name in phases}


@dataclasses.dataclass(frozen=True)
class _Described:
    """One function of a run on a mesh, for any chip. `steps` are those of its data, if it can be read."""

    config: ConfigDict
    model_config: ModelConfig
    sizes: tuple[int, int, int]
    name: str  # a phase, or "sampling"
    flag_values: flags.FlagValues
    steps: Steps | None

    @property
    def rows(self) -> int:
        config = self.config if self.name == _SAMPLING else phase_config(self.config, self.name)
        return config.batch_size

    def job(self, mesh: Any, rows: int, on_cpu: bool) -> Job:
        if self.name != _SAMPLING:
            return training_job(self.config, self.name, self.model_config, mesh, rows, on_cpu)
        given = self.flag_values
        generation = Generation(
            rows, given.prompt_length, given.max_new_tokens, given.steps, given.block_length or None
        )
        return sampling_job(self.config, self.model_config, mesh, generation, on_cpu)

    def estimate(self, rows: int, platform: str, width: int = 0) -> Estimate:
        """Estimates a step with rows of `width` columns (0: `max_length`), or a generation."""
        if self.name == _SAMPLING:
            job = self.job(abstract_mesh(*self.sizes), rows, platform == "cpu")
            return sampling_estimate(self.config, self.model_config, self.sizes, platform, job)
        return self.step.estimate(platform, rows, width)

    @functools.cached_property
    def step(self) -> Step:
        return Step.of(self.config, self.name, self.model_config, self.sizes)

    def total(self, platform: str) -> Callable[[int], int]:
        """Returns the function from a number of rows to bytes."""
        if self.name != _SAMPLING:
            return lambda rows: self.estimate(rows, platform).total
        unit = row_shards(abstract_mesh(*self.sizes))
        one, two = (self.estimate(rows, platform).total for rows in (unit, 2 * unit))
        return lambda rows: one + (two - one) * (rows // unit - 1)


def _estimated(described: _Described, chip: Chip) -> dict[str, Any]:
    capacity = chip.memory * chip.usable
    found = described.estimate(described.rows, chip.platform)
    unit = row_shards(abstract_mesh(*described.sizes))
    most = largest_batch(described.total(chip.platform), capacity, unit)
    return {**_record(described, chip, found.parts, found), "largest_batch_size": most}


def _compiled(described: _Described, chip: Chip) -> dict[str, Any]:
    count = math.prod(described.sizes)
    if chip.name in CHIPS:
        devices = absent_devices(chip, count)
    else:
        devices = (jax.devices("cpu") if chip.platform == "cpu" else jax.devices())[:count]
        if len(devices) < count:
            raise UserError(f"--compile: there are {len(devices)} devices here, and the mesh has {count}")
    start = time.perf_counter()
    job = described.job(mesh_of(np.array(devices).reshape(described.sizes)), described.rows, chip.platform == "cpu")
    parts, compiled = compiled_parts(job)
    seconds = time.perf_counter() - start
    moved = collective_bytes(compiled.as_text(), job.loop_trips)
    found = described.estimate(described.rows, chip.platform)
    named = {name: size for name, size in found.parts.items() if name in ("weights", "adapters", "moments")}
    rest = {"batch": parts.pop("arguments") - sum(named.values()), **parts}
    return {
        **_record(described, chip, {**named, **rest}, found),
        "collective_results_gib": {kind: round(size / GIB, 3) for kind, size in sorted(moved.items())},
        "compile_seconds": round(seconds, 1),
    }


def _record(described: _Described, chip: Chip, parts: dict[str, int], found: Estimate) -> dict[str, Any]:
    total, capacity = sum(parts.values()), chip.memory * chip.usable
    steps, share = described.steps, described.flag_values.peak_share
    step = found
    if steps is not None:  # time is that of typical rows, memory that of the widest
        step = described.estimate(described.rows, chip.platform, max(1, round(steps.mean_width)))
    seconds, bound = _seconds(step, chip, share)
    return {
        "function": described.name,
        "chip": chip.name,
        "mesh": list(described.sizes),
        "rows": described.rows,
        "columns": round(steps.mean_width) if steps else None,
        "steps": steps.count if steps else None,
        "gib": {name: round(size / GIB, 3) for name, size in parts.items()},
        "total_gib": round(total / GIB, 2),
        "capacity_gib": round(capacity / GIB, 2),
        "fits": total <= capacity,
        "teraflop": round(step.flops / 1e12, 3),
        "link_gib": round(step.link_bytes / GIB, 3),
        "seconds": _rounded(seconds) if bound else None,
        "bound_by": bound,
        "run_seconds": _rounded(_run_seconds(described, chip)) if bound and steps else None,
    }


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _run_seconds(described: _Described, chip: Chip) -> float:
    """Returns the seconds of all optimiser steps of the phase, without compilation, evaluations and saves."""
    share, total = described.flag_values.peak_share, 0.0
    for width, count in described.steps.widths.items():
        total += count * _seconds(described.estimate(described.rows, chip.platform, width), chip, share)[0]
    return total


def _seconds(found: Estimate, chip: Chip, peak_share: float) -> tuple[float, str]:
    """Returns (seconds, the bottleneck: products, memory or links); (0, "") for a chip of unknown speed."""
    speeds = {
        "products": (found.flops, chip.flops and chip.flops * peak_share),
        "memory": (found.memory_bytes, chip.bandwidth),
        "links": (found.link_bytes, chip.link),
    }
    known = {name: amount / speed for name, (amount, speed) in speeds.items() if speed}
    bound = max(known, key=known.get, default="")
    return known.get(bound, 0.0), bound


def _print(records: Sequence[dict[str, Any]]) -> None:
    """Three tables that fit a terminal: whether each function fits, where its memory goes, and its work."""
    parts = list(dict.fromkeys(name for record in records for name in record["gib"]))
    has_run = any(record["run_seconds"] is not None for record in records)
    fits, memory, work = [], [], []
    for record in records:
        named = [record["function"], record["chip"], ",".join(map(str, record["mesh"]))]
        size = [f"{record['total_gib']:.2f}", f"{record['capacity_gib']:.1f}"]
        size += ["yes" if record["fits"] else "DOES NOT FIT", str(record.get("largest_batch_size", "-"))]
        seconds = f"{record['seconds']:.3g}" if record["seconds"] else "unknown"
        fits.append([*named, *size, seconds, record["bound_by"] or "-"])
        memory.append([*named, *(f"{record['gib'][name]:.2f}" if name in record["gib"] else "-" for name in parts)])
        work.append([*named, f"{record['teraflop']:.1f}", f"{record['link_gib']:.2f}"])
        if has_run:
            known = record["run_seconds"] is not None
            work[-1] += [str(record["steps"]), f"{record['run_seconds'] / 3600:.2f}"] if known else ["-", "-"]
    where = ["function", "chip", "mesh"]
    print_table([*where, "GiB of", "has", "fits", "largest batch_size", "seconds", "bound by"], fits, left=3)
    print("\nGiB by part", flush=True)
    print_table([*where, *parts], memory, left=3, gap=2)
    print(f"\nWork of a step{' and of the phase' if has_run else ''}", flush=True)
    print_table([*where, "TFLOP", "GiB linked", *(["steps", "hours of all"] if has_run else [])], work, left=3)


def _header(
    config: ConfigDict, model_config: ModelConfig, flag_values: flags.FlagValues, steps: dict[str, Steps]
) -> str:
    stored = quantization(config)
    lengths = f"rows of {config.max_length} tokens"
    if steps:
        lengths = ", ".join(f"{name}: rows of {each.mean_width:.0f} tokens on average" for name, each in steps.items())
        lengths += f" (memory: {config.max_length})"
    return "\n  ".join(
        (
            f"{config.model}: {model_config.num_layers} layers of {model_config.hidden_size}, {_size(model_config)}"
            f"{stored.format if stored else config.dtype} base",
            f"{config.attention} attention by {config.attention_kernel}, remat {config.remat}",
            f"steps of {config.gradient_accumulation_steps} x {config.batch_size}, {lengths}",
            f"{'compiled' if flag_values.compile else 'estimated'}, products at {flag_values.peak_share:g} of the peak",
        )
    )


def _size(model_config: ModelConfig) -> str:
    """Returns the parameters of a model with experts, total and active per token, as text."""
    if model_config.experts is None:
        return ""
    total, active = parameters(model_config)
    return f"{total / 1e9:.1f} billion parameters, {active / 1e9:.1f} of them active, "


def _jobs(config: ConfigDict, what: str) -> list[str]:
    phases = [] if what == "sample" else list(config.phases)
    return phases if what == "train" else [*phases, _SAMPLING]


def _sizes(text: str) -> tuple[int, int, int]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise UserError(f"--mesh={text}: must be three integers") from error
    if len(sizes) != 3 or min(sizes) < 1:
        raise UserError(f"--mesh={text}: must be three integers above 0: data, fsdp, tensor")
    return sizes


def _chip(name: str, memory_share: float) -> Chip:
    chip = CHIPS.get(name) or apple_chip(name)
    if name in ("cpu", "this"):
        chip = _this_machine("cpu" if name == "cpu" else jax.default_backend())
    if chip is None:
        raise UserError(f"--chips={name}: is not one of {', '.join((*CHIPS, 'm16', 'cpu', 'this'))}")
    return dataclasses.replace(chip, usable=memory_share) if memory_share else chip


def _this_machine(platform: str) -> Chip:
    """Describes the first device of this machine. The speed of a CPU is measured with a matmul."""
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
