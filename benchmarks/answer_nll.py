"""Masked NLL of longer held-out answers after a short training, compared with the NLL of the causal base.

    python benchmarks/answer_nll.py --train=gsm8k_train.jsonl --test=gsm8k_test.jsonl [--steps=90] [--out=runs/answers]

Trains the quickstart's model on the rows of `--train` that fit into `--max_length` tokens (for training
alone, `max_length=N` after the flags sets another limit). Prints nats per masked token at fixed mask rates on the first
`--rows` such rows of `--test`, and the seconds and CPU seconds of the training. Other config keys follow as
`key=value`. The same command resumes.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from recipes import cpu_seconds, masked_scores

from difflm_jax import load
from difflm_jax.config.files import load_config
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import read_run_config
from difflm_jax.training.run import train

RATES = (0.15, 0.5, 0.8, 1.0)
# Complementary pairs: every token of an answer is scored once in each pair of rows.
RECIPE = {
    "phases": "sft",
    "batching": "rows",
    "loss_weight": "uniform",
    "overlong": "drop",
    "answer_padding": 0,
    "test_size": 0,
    "sample_prompts": 0,
    "report.data": "",
    "complementary_masks": True,
    "batch_size": 4,
    "min_mask_probability": 0.05,
    "max_mask_probability": 0.95,
    "length_multiple": 32,
    "seed": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/answers"))
    parser.add_argument("changes", nargs="*", help="key=value")
    options = parser.parse_args()
    keys = {**RECIPE, "dataset": options.train, "max_length": options.max_length, "sft.max_steps": options.steps}
    overrides = [f"{key}={value}" for key, value in {**keys, "output_dir": options.out}.items()]
    config = load_config("configs/quickstart.py", [*overrides, *options.changes])
    if config.trained == "all":
        parser.error("trained=all: the causal base that answers are compared with is the one under an adapter")
    began, cpu = time.perf_counter(), cpu_seconds()
    train(config)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    config = read_run_config(options.out)  # with the resolved dtype
    lm = load(config.model, adapter=options.out / "sft_model", dtype=config.dtype)
    print(f"trained for {seconds:.0f} s, {cpu:.0f} CPU s (all of them if the run was not resumed)", flush=True)
    found = {"seconds": seconds, "cpu_seconds": cpu, "steps": options.steps, "changes": options.changes}
    found["base"] = masked_scores(causal(lm), options.test, options.max_length, 1.0, 1.0, options.rows)["masked_nll"]
    print(f"causal base: {found['base']:.3f}", flush=True)
    for rate in RATES:
        scores = masked_scores(lm, options.test, options.max_length, rate, rate, options.rows)
        found[str(rate)] = scores["masked_nll"]
        print(f"rate {rate}: {scores['masked_nll']:.3f}", flush=True)
    (options.out / "answer_nll.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def causal(lm: LanguageModel) -> LanguageModel:
    """Returns the base as block diffusion with blocks of one token and the shift: next-token prediction."""
    base = dataclasses.replace(lm, model=lm.model.clone(lora=None), lora=None)
    return base.with_diffusion(attention="block", block_length=1, logit_shift=True)


if __name__ == "__main__":
    main()
