"""Runs all GPU measurements in one call of less than 25 minutes: stages in turn, each with its own time limit.

    python -m benchmarks.card --out=DIR [--model=DIR] [--moe=DIR] [--smollm2=FILE --data=FILE] [--only=train,decode,...]

`--model` and `--moe` are directories with only a `config.json` (Qwen3-4B and Qwen3-30B-A3B); weights are random.
`--smollm2` is a model with weights, and `--data` the training rows of a drafting adapter; without them, those
stages are listed as skipped. The output of a stage is streamed to `DIR/STAGE.txt`, so nothing is lost if the call ends
early. `DIR/stages.json` has the exit of each stage. `--only` splits the stages over several calls. A peer and the
product run in the same stage, the peer first and last.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

TRAIN = "torch_best; lora remat=none unroll_layers=true; lora; nf4 unroll_layers=true; torch_nf4_best; torch_best"
DECODE = "torch_generate batch=1,128; generate batch=1,8,128; torch_generate batch=1,128"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command with its time limit in seconds. `needs`: the flags that it requires."""

    name: str
    limit: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--moe", default="")
    parser.add_argument("--smollm2", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--only", default="", help="names of stages, separated by commas; empty: all")
    parser.add_argument("--ways", default="", help="instead of the ways of training, separated by semicolons")
    parser.add_argument("--rows", type=int, default=16, help="of a training step")
    parser.add_argument("--length", type=int, default=768, help="of those rows")
    parser.add_argument("--counts", default="1,2,4,8,16,32,64", help="rows of a pass")
    options = parser.parse_args()
    found = stages(options)
    names = options.only.split(",") if options.only else list(found)
    unknown = [name for name in names if name not in found]
    if unknown:
        parser.error(f"--only: no stage is named {', '.join(unknown)}; there are {', '.join(found)}")
    directory = Path(options.out)
    directory.mkdir(parents=True, exist_ok=True)
    ended = {}
    for name in names:
        missing = [need for need in found[name].needs if not getattr(options, need)]
        ended[name] = {"left_out": f"no --{missing[0]}"} if missing else run(found[name], directory)
        print(f"{name}: {ended[name]}", flush=True)
        (directory / "stages.json").write_text(json.dumps(ended, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(stage.get("exit_status") for stage in ended.values()))


def stages(options: argparse.Namespace) -> dict[str, Stage]:
    """Returns the stages by name, the most important first."""
    shape = (f"--rows={options.rows}", f"--length={options.length}")
    accelerator = ("-m", "benchmarks.accelerator", "--rounds=3", "--steps=4")
    out, run_directory = f"--out={options.out}", f"{options.out}/lossless"
    training = ("-m", "difflm_jax.train", "--config=configs/lossless.py", f"--config.output_dir={run_directory}")
    of_run = (f"--config.model={options.smollm2}", f"--config.dataset={options.data}", "--config.dtype=bfloat16")
    evaluated = (f"--run={run_directory}", f"--data={options.data}", "--rows=64", "--lossless")
    model, moe = f"--model={options.model}", f"--model={options.moe}"
    all_stages = (
        Stage("rows", 240, ("-m", "benchmarks.rows", model, f"--rows={options.counts}", out), ("model",)),
        Stage("train", 420, (*accelerator, model, f"--ways={options.ways or TRAIN}", *shape, out), ("model",)),
        Stage("decode", 300, (*accelerator, model, f"--ways={DECODE}"), ("model",)),
        Stage("moe", 240, (*accelerator, moe, "--ways=nf4 remat=full", "--rows=8", "--length=1024"), ("moe",)),
        Stage("lossless_train", 600, (*training, *of_run), ("smollm2", "data")),
        Stage("lossless", 180, ("-m", "difflm_jax.evaluate", *evaluated), ("smollm2", "data")),
    )
    return {stage.name: stage for stage in all_stages}


def run(stage: Stage, directory: Path) -> dict[str, float | int | str]:
    """Runs a stage and returns how it ended. Its output is in `directory`."""
    begun = time.perf_counter()
    with (directory / f"{stage.name}.txt").open("w", encoding="utf-8") as output:
        try:
            command = [sys.executable, *stage.command]
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=stage.limit).returncode
        except subprocess.TimeoutExpired:
            return {"exit_status": 124, "seconds": stage.limit, "why": "not finished in its time"}
    return {"exit_status": status, "seconds": round(time.perf_counter() - begun, 1)}


if __name__ == "__main__":
    main()
