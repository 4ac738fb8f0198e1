"""What a quantised base costs in learning: the quickstart's model trained on every kind of base with the same budget.

    python benchmarks/quantised_learning.py [--steps=60] [--out=runs/quantised]

Trains (the quickstart's configuration, seed, data and order of batches; 10 pretraining steps and `--steps` of SFT),
scores the held-out questions with `difflm_jax.evaluate`, and prints one table. Takes about 4 minutes a base on 2 cores.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

BASES = ("none", "int8", "nf4", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/quantised"))
    options = parser.parse_args()
    records = {base: _record(base, options) for base in BASES}
    (options.out / "table.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    rates = list(records["none"]["by_mask_rate"])
    print(f"{'base':<10}{'seconds':>9}{'exact match':>13}{'masked NLL':>12}" + "".join(f"{rate:>10}" for rate in rates))
    for base, record in records.items():
        by_rate = "".join(f"{record['by_mask_rate'][rate]['masked_nll']:>10.3f}" for rate in rates)
        name = "float32" if base == "none" else base
        print(
            f"{name:<10}{record['seconds']:>9.0f}{record['exact_match']:>13.2f}{record['masked_nll']:>12.3f}{by_rate}"
        )


def _record(base: str, options: argparse.Namespace) -> dict:
    run, result = options.out / base, options.out / f"{base}.json"
    start = time.perf_counter()
    _python(
        "difflm_jax.train",
        "--config=configs/quickstart.py",
        f"--config.output_dir={run}",
        f"--config.quantization={'' if base == 'none' else base}",
        f"--config.sft.max_steps={options.steps}",
        "--config.sample_prompts=0",
        "--config.report.data=",
    )
    seconds = time.perf_counter() - start
    data = "--data=builtin:quickstart_heldout"
    _python(
        "difflm_jax.evaluate", f"--run={run}", data, "--max_new_tokens=16", "--tokens_per_pass=1", f"--out={result}"
    )
    found = json.loads(result.read_text(encoding="utf-8"))
    matches = found["generated"][-1]["matches"] / len(found["questions"])
    return {"seconds": seconds, "exact_match": matches, **found["masked"]}


def _python(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    main()
