"""Which recipe converts best: variants of the quickstart trained on equal budgets, and one table.

    python benchmarks/recipes.py [--variants=ce,distil] [--seeds=0,1,2] [--steps=40] [--out=runs/recipes]
    python benchmarks/recipes.py --table                 # prints what is there

Every (variant, seed) runs in its own process and writes one JSON file; existing files are kept. A variant is
the quickstart's configuration with other keys. Reported are masked NLL of the held-out answers by mask rate, exact
matches on the 60 held-out questions at several numbers of tokens per pass, the share of answers in which a token
directly follows itself, and the share of empty ones.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from difflm_jax.config.files import load_config
from difflm_jax.data.batches import batches, plan_batches
from difflm_jax.data.examples import Options
from difflm_jax.data.packing import BatchOptions
from difflm_jax.data.tokenised import tokenize
from difflm_jax.diffusion.corruption import Corruption
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import place
from difflm_jax.evaluation.masked import Evaluator, by_rate, summarise
from difflm_jax.evaluation.tasks import read_questions
from difflm_jax.evaluation.tasks.exact import normalised
from difflm_jax.lm import LanguageModel
from difflm_jax.training.run import train
from difflm_jax.training.step import StepOptions

HELD_OUT = "builtin:quickstart_heldout"
CANVAS = 16
SHARED = {
    "phases": "sft",
    "batching": "rows",
    "loss_weight": "uniform",
    "batch_size": 8,
    "max_length": 96,
    "remat": "none",
    "length_multiple": 8,
    "sample_prompts": 0,
    "test_size": 0,
    "report.data": "",
}

# Changes of each variant to the quickstart's configuration; "ce" is the one that the others start from.
VARIANTS: dict[str, dict[str, Any]] = {
    "ce": {},
    "seed_rule": {
        "loss_tokens": "all",
        "mask_rate": "batch",
        "min_mask_probability": 0.1,
        "max_mask_probability": 0.95,
    },
    "mdlm": {"loss_weight": "inverse_rate", "min_mask_probability": 0.05},
    "llada_sft": {"loss_weight": "inverse_rate", "loss_average": "answers", "min_mask_probability": 0.05},
    "cart": {"loss_weight": "context"},
    "complementary": {"complementary_masks": True, "batch_size": 4},
    "distil": {"distillation_weight": 1.0},
    "policy": {"on_policy": 0.75},
    "policy_distil": {"on_policy": 0.75, "distillation_weight": 1.0},
    "own_distil": {"on_policy": 0.75, "on_policy_tokens": "own", "distillation_weight": 1.0},
    "first_eos": {"eos_loss": "first"},
    "no_shift": {"logit_shift": False},
    "full": {"attention": "full"},
    "full_no_shift": {"attention": "full", "logit_shift": False},
    "block4": {"attention": "block", "block_length": 4, "mask_rate": "block"},
    "rank4": {"lora_config.r": 4, "lora_config.lora_alpha": 8},
    "rank64": {"lora_config.r": 64, "lora_config.lora_alpha": 128},
    "nf4": {"quantization": "nf4"},
    "base_mask_row": {"train_mask_row": False},
    "all_weights": {"trained": "all", "learning_rate": 5e-5},
    "anneal": {"anneal_steps": 20, "anneal_power": 3.0},
    "full_anneal": {"attention": "full", "anneal_steps": 20, "anneal_power": 3.0},
    "grow": {"attention": "block", "block_length": 16, "mask_rate": "block", "block_growth_steps": 20},
}

# Ways of decoding: name -> (least tokens of the canvas per pass, options of `generate`).
_SUREST = {"algorithm": "probability"}
_STEADY = {**_SUREST, "leftmost": True, "schedule": "deadline"}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "surest 1": (1, _SUREST),
    "surest 2": (2, _SUREST),
    "surest 4": (4, _SUREST),
    "leftmost 1": (1, {**_SUREST, "leftmost": True}),
    "steady 2": (2, {**_STEADY, "threshold": 0.9}),
    "steady 4": (4, {**_STEADY, "threshold": 0.9}),
    "steady 0.8": (1, {**_STEADY, "threshold": 0.8}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.variants.split(",")) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(sorted(unknown))} is not one of {', '.join(VARIANTS)}")
    if options.one:
        return run(options.variants, int(options.seeds), options.steps, options.out)
    for seed in () if options.table else options.seeds.split(","):
        for name in options.variants.split(","):
            if not result_file(options.out, name, int(seed), options.steps).is_file():
                arguments = [
                    f"--variants={name}",
                    f"--seeds={seed}",
                    f"--steps={options.steps}",
                    f"--out={options.out}",
                ]
                subprocess.run([sys.executable, __file__, "--one", *arguments], check=True)
                print_table(options.out)
    print_table(options.out)


def result_file(out: Path, name: str, seed: int, steps: int) -> Path:
    return out / f"{name}-{steps}-{seed}.json"


def run(name: str, seed: int, steps: int, out: Path) -> None:
    """Trains and scores one variant, and writes its file."""
    changes = {**SHARED, **VARIANTS[name], "seed": seed, "sft.max_steps": steps}
    directory = out / "runs" / f"{name}-{steps}-{seed}"
    overrides = [f"{key}={value}" for key, value in {**changes, "output_dir": directory}.items()]
    config = load_config("configs/quickstart.py", overrides)
    began, cpu = time.perf_counter(), cpu_seconds()
    lm = train(config)
    trained = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu}
    record = {
        "variant": name,
        "changes": VARIANTS[name],
        "seed": seed,
        "steps": steps,
        "trained": trained,
        "versions": {"jax": jax.__version__},
        "masked": masked_scores(lm, HELD_OUT, config.max_length),
        "decoded": decoded(lm, HELD_OUT),
    }
    out.mkdir(parents=True, exist_ok=True)
    result_file(out, name, seed, steps).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def masked_scores(
    lm: LanguageModel, data: str, max_length: int, low: float = 1e-3, high: float = 1.0, count: int = 0
) -> dict[str, Any]:
    """Returns the masked NLL of the answers in `data`, without padding, at rates stratified over [low, high].

    Scores the first `count` rows (0: all) that fit into `max_length` tokens.
    """
    rows = tokenize(
        data,
        lm.tokenizer,
        Options("sft", max_length, overlong="drop", mask_token_id=lm.mask_token_id),
    )
    rows = rows.select(range(min(count or len(rows), len(rows))))
    corruption = Corruption(lm.diffusion, scope="answer", min_rate=low, max_rate=high, loss=LossRule("masked"))
    options = BatchOptions(
        batch_size=20, shuffle=False, pad_id=lm.pad_token_id, max_length=max_length,
        answer_padding=lm.block_length, eos_id=lm.tokenizer.eos_token_id,
    )  # fmt: skip
    data_batches = batches(rows, plan_batches(rows, options), strata="rows")
    mesh = lm.mesh or make_mesh(1)
    evaluate = Evaluator(
        StepOptions(lm.model, corruption, 256),
        mesh,
        (data_batches[i] for i in range(len(data_batches))),
        jax.random.key(0),
    )
    sums = evaluate(place(lm.variables, mesh))
    return {**summarise(sums), "by_mask_rate": by_rate(sums)}


def decoded(lm: LanguageModel, data: str) -> dict[str, Any]:
    """Returns exact matches, passes per row, degenerate answers and all answers for every way of decoding."""
    questions = read_questions(data)
    results = {}
    for name, (tokens, options) in WAYS.items():
        prompts = [question.messages for question in questions]
        out = lm.generate(prompts, CANVAS, -(-CANVAS // tokens), batch_size=len(prompts), **options)
        pairs = zip(out.texts, questions, strict=True)
        results[name] = {
            "exact_match": sum(normalised(text) == normalised(q.reference) for text, q in pairs) / len(questions),
            "passes": float(np.mean(out.steps)),
            "tokens_per_pass": float(np.mean([len(row) for row in out.tokens]) / np.mean(out.steps)),
            "repeats": float(np.mean([bool((row[1:] == row[:-1]).any()) for row in out.tokens])),
            "empty": float(np.mean([len(row) <= 1 for row in out.tokens])),
            "texts": out.texts,
        }
    return results


def print_table(out: Path) -> None:
    """Prints means over seeds, and the standard deviation if there are several."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for path in sorted(out.glob("*.json")):
        record = json.loads(path.read_text())
        groups.setdefault((record["variant"], record["steps"]), []).append(record)
    ways = " | ".join(WAYS)
    print(f"\n| variant | steps | seeds | NLL | {ways} | repeats | empty | CPU s |")
    print("|---" * (len(WAYS) + 7) + "|")
    for (name, steps), records in groups.items():
        columns = [[r["masked"]["masked_nll"] for r in records]]
        columns += [[r["decoded"][way]["exact_match"] for r in records] for way in WAYS if way in records[0]["decoded"]]
        columns += [[r["decoded"]["steady 2"][what] for r in records] for what in ("repeats", "empty")]
        columns += [[r["trained"]["cpu_seconds"] for r in records]]
        print(f"| {name} | {steps} | {len(records)} | {' | '.join(map(_mean, columns))} |", flush=True)


def _mean(values: list[float]) -> str:
    spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
