"""Checks whether this machine is ready, and prints a fix for each problem.

    difflm doctor [--config=FILE [--config.key=value ...]] [--json]

Looks at Python, packages, devices, memory, disk, caches, the hub and Weights & Biases; with a config at its model, data
and the memory that `difflm plan` expects. Exit status 1: something will not work.
"""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from difflm_jax.cli import run_command, suggest_next
from difflm_jax.config.files import load_config, take_overrides
from difflm_jax.config.schema import KEYS
from difflm_jax.errors import UserError, exit_with_errors, one_line

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", "", "A .py, .yaml or .json file whose run is checked too.", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "Print the checks as JSON.", flag_values=FLAGS)

OK, WARNING, FAILURE = "ok", "warning", "failure"
_GIB = 2**30
_LITTLE_DISK, _LITTLE_MEMORY = 5 * _GIB, 3 * _GIB  # needed for the quickstart: environment, model, run
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check: `state` is ok, warning or failure; `fix` says how to fix a problem."""

    name: str
    state: str
    found: str
    fix: str = ""


def main(flag_values: flags.FlagValues, overrides: Sequence[str]) -> int:
    """Prints a line per check, and a fix if it is not ok. Returns 1 if something will not work."""
    config = load_config(flag_values.config, overrides) if flag_values.config or overrides else None
    checks = []
    for check in examine(config, flag_values.config, overrides):
        checks.append(check)
        if not flag_values.json:
            print(f"{check.state:<8} {check.name:<12} {check.found}", flush=True)
            if check.fix:
                print(f"{'':<8} {'':<12} fix: {check.fix}", flush=True)
    if flag_values.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    failed = any(check.state == FAILURE for check in checks)
    if not failed:
        suggest_next("bash scripts/quickstart.sh" if config is None else f"difflm train --config={flag_values.config}")
    return int(failed)


def examine(config: ConfigDict | None = None, path: str = "", overrides: Sequence[str] = ()) -> Iterator[Check]:
    """Yields the result of every check. Checks of a run require its `config`."""
    yield _python()
    yield from _packages()
    yield _devices()
    yield _host_memory()
    yield _disk("disk", Path(config.output_dir if config else "."))
    for name, directory in _caches().items():
        yield _disk(name, directory)
    yield _hub(needed=config is not None and not Path(config.model).expanduser().exists())
    yield _wandb(config)
    if config is not None:
        yield _data(config)
        yield _plan(path, overrides)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.prefix == sys.base_prefix:
        fix = "source .venv/bin/activate (bash scripts/setup.sh makes it)"
        return Check("python", WARNING, f"{version}, in no environment of its own ({sys.executable})", fix)
    return Check("python", OK, f"{version} ({sys.executable})")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Check]:
    """Checks that jax, jaxlib and plugins have the same version."""
    jax, jaxlib = _installed("jax"), _installed("jaxlib")
    update = "bash scripts/setup.sh --update (with --cuda or --tpu, if that is what you have)"
    if jax is None or jaxlib is None:
        yield Check("jax", FAILURE, f"jax {jax}, jaxlib {jaxlib}", update)
        return
    differ = jax != jaxlib
    yield Check("jax", WARNING if differ else OK, f"jax {jax}, jaxlib {jaxlib}", update if differ else "")
    for name in _PLUGINS:
        if (version := _installed(name)) is not None:
            skewed = version != jaxlib
            found = f"{name} {version}" + (f", but jaxlib {jaxlib}" if skewed else "")
            yield Check("plugin", FAILURE if skewed else OK, found, update if skewed else "")


def _devices() -> Check:
    """Checks that jax sees the devices that the machine has."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return Check("devices", FAILURE, one_line(error)[:200], "JAX_PLATFORMS=cpu uses the processor alone")
    kind, count = devices[0].device_kind, len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0) if devices[0].platform != "cpu" else 0
    found = f"{count} x {kind}" + (f", {limit / _GIB:.1f} GiB each for jax" if limit else "")
    unused = {"NVIDIA GPU": ("/dev/nvidia0", "--cuda"), "TPU": ("/dev/accel0", "--tpu")}
    for name, (node, option) in unused.items():
        if devices[0].platform == "cpu" and Path(node).exists():
            fix = f"bash scripts/setup.sh --update {option} (unless JAX_PLATFORMS=cpu is meant)"
            return Check("devices", WARNING, f"{found}, but there is a {name} ({node})", fix)
    return Check("devices", OK, found)


def _host_memory() -> Check:
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return Check("memory", OK, "not known on this system")
    little = free < _LITTLE_MEMORY
    fix = "the quickstart takes 3 GB: end other programs, or take a smaller model" if little else ""
    return Check("memory", WARNING if little else OK, f"{free / _GIB:.1f} GiB of the host are free", fix)


def _caches() -> dict[str, Path]:
    """Returns the cache directories for downloads, tokenised data and compiled programs, by name."""
    import datasets
    import huggingface_hub

    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return {
        "hub cache": Path(huggingface_hub.constants.HF_HUB_CACHE),
        "data cache": Path(datasets.config.HF_DATASETS_CACHE),
        "compiled": Path(compiled).expanduser(),
    }


def _disk(name: str, directory: Path) -> Check:
    """Checks free space and write permission for a directory that exists or will be created."""
    there = directory.expanduser().absolute()
    while not there.exists():
        there = there.parent
    variable = {"hub cache": "HF_HOME", "data cache": "HF_DATASETS_CACHE", "compiled": "JAX_COMPILATION_CACHE_DIR"}
    other = (
        f"{variable[name]}=DIR names another place" if name in variable else "--config.output_dir names another place"
    )
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Check(name, FAILURE, f"{directory}: cannot be written", other)
    free = shutil.disk_usage(there).free
    little = free < _LITTLE_DISK
    found = f"{directory}: {free / _GIB:.0f} GiB free"
    return Check(name, WARNING if little else OK, found, f"make room, or {other}" if little else "")


def _hub(needed: bool) -> Check:
    """Checks that the Hugging Face hub answers. It is a failure only if the config's model comes from there."""
    import huggingface_hub

    state = FAILURE if needed else WARNING
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return Check("hub", OK, "not asked (HF_HUB_OFFLINE is set)")
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5):
            return Check("hub", OK, f"{endpoint} answers")
    except (OSError, ValueError) as error:
        fix = "give local files for model and data; with filled caches set HF_HUB_OFFLINE=1"
        return Check("hub", state, f"{endpoint}: {one_line(error)[:100]}", fix)


def _wandb(config: ConfigDict | None) -> Check:
    from difflm_jax.training.tracking import tracking_mode

    if config is not None and not config.wandb_config.project:
        return Check("wandb", OK, "off (wandb_config.project is empty)")
    mode = tracking_mode(config.wandb_config.mode if config else "auto")
    hint = " (wandb login puts them online)" if mode == "offline" else ""
    return Check("wandb", OK, f"runs are {mode}{hint}")


def _data(config: ConfigDict) -> Check:
    """Checks that the model's config and the data of the run can be found."""
    from difflm_jax.checkpoint.source import read_model_config
    from difflm_jax.data.sources import open_source

    try:
        model = read_model_config(config.model, config.revision or None)
        open_source(config.dataset)
    except UserError as error:
        return Check("run", FAILURE, str(error), "--config.model= and --config.dataset= name others")
    return Check("run", OK, f"{config.model}: {model.num_layers} layers of {model.hidden_size}; data {config.dataset}")


def _plan(path: str, overrides: Sequence[str]) -> Check:
    """Checks the run against this machine's memory with `difflm plan`."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "plan.json"
        words = [*([f"--config={path}"] if path else []), *(f"--config.{item}" for item in overrides)]
        command = [sys.executable, "-m", "difflm_jax.plan", *words, "--chips=this", f"--out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            return Check("fit", WARNING, (done.stderr.strip().splitlines() or ["no answer"])[-1][:200], "difflm plan")
        records = json.loads(out.read_text())
    worst = max(records, key=lambda record: record["total_gib"] / max(record["capacity_gib"], 1e-9))
    found = f"{worst['function']} takes {worst['total_gib']:.1f} of {worst['capacity_gib']:.1f} GiB"
    fix = "half of --config.batch_size and twice --config.gradient_accumulation_steps; or --config.quantization=nf4"
    return Check("fit", OK if worst["fits"] else FAILURE, found, "" if worst["fits"] else fix)


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""

    def split_and_run() -> int:
        overrides, others = take_overrides(argv)
        return run_command(lambda flag_values: main(flag_values, overrides), FLAGS, __doc__, others, KEYS)

    return exit_with_errors(split_and_run)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
