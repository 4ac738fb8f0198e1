"""Start-up and memory: a prompt and a training step from a fresh process, by part, of one or several source trees.

    python -m benchmarks.startup [--tree=NAME=PATH ...] [--adapter=DIR] [--rounds=3] [--train] [--out=DIR]

Trees (checkouts of this project; default: this one) take turns. A round before the first is not counted: it compiles
programs and bytecode. `wall` is the seconds of the whole process and `cpu_seconds` what it computed. The parts of a
prompt asked in Python are imports, load and answer, in seconds, each with the peak resident memory after it in MiB;
`compiling` is what jax spent in them on tracing, lowering, and compiling or fetching programs. With `--train`, `step`
is the time until a run of configs/quickstart.py has written its first step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import add_report_flags, median_of, report

HERE = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, resource, sys, time
start, parts = time.perf_counter(), {}
def done(name):
    parts[name] = time.perf_counter() - start - sum(parts.get(key, 0) for key in ("imports", "load", "answer"))
    parts[name + "_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
source, adapter, prompt, tokens = sys.argv[1:]
import difflm_jax, difflm_jax.generate
import jax
done("imports")
spent = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: spent.append(seconds) if name.startswith("/jax/core/compile/") else None)
lm = difflm_jax.load(source, adapter=adapter or None)
done("load")
loading, spent[:] = sum(spent), []
out = lm.generate(prompt, max_new_tokens=int(tokens), steps=int(tokens))
done("answer")
parts["compiling"] = loading + sum(spent)
print(json.dumps({**parts, "text": out.texts[0]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="append", default=[], help="NAME=PATH of a checkout")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--prompt", default="What is 2+2?")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--train", action="store_true", help="time a training run to its first step too")
    add_report_flags(parser, rounds=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # All trees keep their compiled programs here; the round that is not counted fills it.
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        report("startup", options, _measured(options), "wall")


def _measured(options: argparse.Namespace) -> list[dict]:
    """A row of medians for each tree."""
    trees = dict(tree.split("=", 1) for tree in options.tree) or {"this tree": str(HERE)}
    found: dict[str, list[dict]] = {name: [] for name in trees}
    for number in range(-1, options.rounds):
        for name, tree in trees.items():
            measured = _prompt(Path(tree), options) | (_first_step(Path(tree), options) if options.train else {})
            if number >= 0:
                found[name].append(measured)
    return [{"way": name, **_medians(rounds)} for name, rounds in found.items()]


def _prompt(tree: Path, options: argparse.Namespace) -> dict:
    """Seconds and memory of one prompt in a fresh process."""
    asked = [str(Path(options.model).resolve()), options.adapter and str(Path(options.adapter).resolve())]
    command = [sys.executable, "-c", PROGRAM, *asked, options.prompt, str(options.tokens)]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, env=_environment(tree), stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{tree}: the prompt ended with {process.returncode}")
    return {
        "wall": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        **json.loads(printed[-1]),
    }


def _first_step(tree: Path, options: argparse.Namespace) -> dict:
    """Seconds until a training run has written its first line of metrics, and its peak memory until then."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        flags = ["--config=configs/quickstart.py", "--config.log_interval=1", f"--config.output_dir={run}"]
        flags += [f"--config.model={Path(options.model).resolve()}"]
        start = time.perf_counter()
        with (Path(directory) / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "difflm_jax.train", *flags],
                cwd=tree,
                env=_environment(tree),
                stdout=log,
                stderr=log,
            )
            try:
                while not _has_step(run / "metrics.jsonl"):
                    if process.poll() is not None:
                        raise SystemExit(f"{tree}: training ended:\n{(Path(directory) / 'log').read_text()[-2000:]}")
                    time.sleep(0.02)
                seconds = time.perf_counter() - start
            finally:
                process.kill()
                _, _, usage = os.wait4(process.pid, 0)
                process.returncode = 0
    return {"step": seconds, "step_peak_mib": usage.ru_maxrss / 1024}


def _has_step(metrics: Path) -> bool:
    return metrics.is_file() and '"loss"' in metrics.read_text()


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def _medians(rounds: list[dict]) -> dict:
    """The medians of the rounds; the text of the answer, of which there must be one."""
    texts = {measured.pop("text") for measured in rounds}
    if len(texts) != 1:
        raise SystemExit(f"one prompt had several answers: {sorted(texts)}")
    return {key: median_of([measured[key] for measured in rounds]) for key in rounds[0]} | {"text": repr(texts.pop())}


if __name__ == "__main__":
    main()
