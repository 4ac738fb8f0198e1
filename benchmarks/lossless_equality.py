"""Checks that speculative decoding gives its base's text, by prompt, strategy, batch size and base.

    python -m benchmarks.lossless_equality --model=MODEL --adapter=RUN/sft_model --data=FILE [--rows=50]

The reference is plain greedy decoding of the same base, one token per pass at batch 1. A row that differs is listed
with the gap of the base's two best logits at the first difference, recomputed in one pass over the row: a difference
at a gap of 0 is a tie, and rounding can move a gap of about 1e-4 in float32. `--torch` also decodes with
transformers, for a dense base that it can read. The exit status is 1 if a row differs at a wider gap.
`--out=FILE` saves all as JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import difflm_jax
from benchmarks.common import machine
from difflm_jax.evaluation.tasks import read_questions
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.drafts import STRATEGIES

ROUNDING = {"float32": 1e-4, "bfloat16": 0.0}  # the widest gap of two logits that another order of sums may invert


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True, help="rows with prompts, as for evaluate")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=sorted(ROUNDING))
    parser.add_argument("--quantization", default="dense,nf4", help="bases, separated by commas")
    parser.add_argument("--batch_sizes", default="1,8")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--torch", action="store_true", help="transformers' greedy decoding too, of the dense base")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    rows, found = None, []
    for held in options.quantization.split(","):
        quantization = None if held == "dense" else held
        lm = difflm_jax.load(options.model, adapter=options.adapter, dtype=options.dtype, quantization=quantization)
        rows = rows or lm.prompts.all([question.prompt for question in read_questions(options.data, options.rows)])
        base = lm.base()
        reference = base.generate(rows, max_new_tokens=options.max_new_tokens, batch_size=1).tokens
        if options.torch and held == "dense":
            found.append(compared("transformers", base, rows, reference, torch_greedy(rows, reference, options), {}))
        for size in map(int, options.batch_sizes.split(",")):
            for strategy in ("plain", *options.strategies.split(",")):
                began = time.perf_counter()
                given = {"max_new_tokens": options.max_new_tokens, "batch_size": size}
                out = (
                    base.generate(rows, **given)
                    if strategy == "plain"
                    else lm.generate(rows, strategy=strategy, **given)
                )
                facts = {
                    "base": held,
                    "batch": size,
                    "tokens_per_pass": sum(map(len, out.tokens)) / int(out.steps.sum()),
                    "seconds": time.perf_counter() - began,
                }
                found.append(compared(strategy, base, rows, reference, out.tokens, facts))
    worst = max((gap for each in found for _, gap in each["different"]), default=0.0)
    print(f"{len(rows)} prompts, at most {options.max_new_tokens} tokens, {options.dtype}")
    print(f"widest gap of two logits where rows differ: {worst:.1e}")
    if options.out:
        record = {"machine": machine(), "options": vars(options), "ways": found, "widest_gap": worst}
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(worst > ROUNDING[options.dtype])


def compared(
    name: str, base: LanguageModel, rows: list[np.ndarray], reference: list[np.ndarray], tokens: Any, facts: dict
) -> dict[str, Any]:
    """Returns the rows that differ, with the gap of the base's logits there; prints a line."""
    different = []
    for i, (expected, other) in enumerate(zip(reference, tokens, strict=True)):
        expected, other = np.asarray(expected), np.asarray(other)
        if expected.tolist() != other.tolist():
            short = min(len(expected), len(other))
            unequal = np.flatnonzero(expected[:short] != other[:short])
            different.append((i, gap(base, rows[i], expected, int(unequal[0]) if len(unequal) else short - 1)))
    counts = {"tokens": int(sum(map(len, reference))), "different": different}
    words = ", ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
    )
    print(f"{name:<13}{words}: {len(different)} of {len(rows)} rows differ {different or ''}", flush=True)
    return {"way": name, **facts, **counts}


def gap(base: LanguageModel, prompt: np.ndarray, answer: np.ndarray, at: int) -> float:
    """Returns the gap between the two best logits for token `at` of an answer."""
    text = np.concatenate([prompt, answer[:at]])
    logits = np.asarray(base(text[None])[0, -1], np.float32)
    logits[base.mask_token_id] = -np.inf
    best = np.sort(logits)[-2:]
    return float(best[1] - best[0])


def torch_greedy(rows: list[np.ndarray], reference: list[np.ndarray], options: argparse.Namespace) -> list[np.ndarray]:
    """Decodes greedily with transformers, as many tokens as the reference has."""
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(options.model)
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    directory = path.parent if where else path
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, options.dtype), **where).eval()
    answers = []
    for row, expected in zip(rows, reference, strict=True):
        x = torch.tensor(np.asarray(row)[None]).long()
        given = {"max_new_tokens": len(expected), "min_new_tokens": len(expected), "do_sample": False}
        out = model.generate(x, attention_mask=torch.ones_like(x), **given)
        answers.append(out[0, x.shape[1] :].numpy())
    return answers


if __name__ == "__main__":
    sys.exit(main())
