"""Masked NLL after training on quantised bases: the quickstart's model on every format, with the same budget.

    python benchmarks/quantised_learning.py [--steps=60] [--out=runs/quantised]

Trains (the quickstart's configuration, seed, data and order of batches; 10 pretraining steps and `--steps` of SFT), and
prints masked NLL (nats per masked token) of the answers to the held-out questions by mask rate, in one table.
"""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

from difflm_jax import evaluate
from difflm_jax.cli import load_from_flags

BASES = ("none", "int8", "nf4", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/quantised"))
    options = parser.parse_args()
    records = {}
    for base in BASES:
        run = options.out / base
        _train(base, run, options.steps)
        records[base] = _scores(run)
        rates = "  ".join(f"{rate} {each['masked_nll']:.3f}" for rate, each in records[base]["by_mask_rate"].items())
        print(f"{base:<6} all {records[base]['masked_nll']:.3f}  {rates}", flush=True)
    (options.out / "table.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def _train(base: str, run: Path, steps: int) -> None:
    command = [
        "--config=configs/quickstart.py",
        f"--config.output_dir={run}",
        f"--config.quantization={'' if base == 'none' else base}",
        f"--config.sft.max_steps={steps}",
        "--config.sample_prompts=0",
        "--config.report.data=",
    ]
    subprocess.run([sys.executable, "-m", "difflm_jax.train", *command], check=True, stdout=subprocess.DEVNULL)


def _scores(run: Path) -> dict:
    flag_values = copy.deepcopy(evaluate.FLAGS)
    flag_values(["evaluate", f"--run={run}"])
    return evaluate.masked_scores(load_from_flags(flag_values), "builtin:quickstart_heldout")


if __name__ == "__main__":
    main()
