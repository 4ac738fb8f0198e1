"""All ways of decoding compared: exact match, answer tokens per second, forward passes; and a plain torch loop.

    python benchmarks/generate.py --run=runs/quickstart                      the table of samplers
    python benchmarks/generate.py --run=runs/quickstart --torch              the same number of passes in torch and here

The ways take turns: a round is one batch of questions, answered by all of them, after two passes that compile.
Figures are medians over rounds. `--only=threshold,Dream` selects ways whose names contain one of these words, and
`--only=-long` those without this one. `--out=FILE` saves everything as JSON. JAX_COMPILATION_CACHE_DIR keeps
compiled samplers between runs. The adapter is merged into the weights first, here as for torch.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import difflm_jax
from difflm_jax.evaluation.tasks import read_questions
from difflm_jax.evaluation.tasks.exact import normalised
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import read_run_config, trained_model

# name -> (attention: None is the adapter's own, else "block" with its length; options of `generate`).
# With n = --max_new_tokens as the canvas; the second group has a canvas of 8 n filled in blocks of n.
ONE_BLOCK = {
    "one token a pass, no cache": {"cache": "none"},
    "one token a pass": {},
    "leftmost, one token a pass": {"leftmost": True},
    "steady": {"algorithm": "steady"},
    "steady, no cache": {"algorithm": "steady", "cache": "none"},
    "original (max logit)": {"algorithm": "confidence"},
    "two tokens a pass": {"passes": 2},
    "LLaDA random": {"algorithm": "random"},
    "Dream entropy": {"algorithm": "entropy", "schedule": "dream", "passes": 2},
    "Dream topk_margin": {"algorithm": "topk_margin", "schedule": "dream", "passes": 2},
    "Dream origin": {"algorithm": "origin"},
    "dLLM schedule": {"schedule": "dllm", "passes": 2},
    "threshold 0.9, no cache": {"threshold": 0.9, "cache": "none"},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.7": {"threshold": 0.7},
    "factor 1": {"factor": 1.0},
    "entropy bound 0.3": {"entropy_bound": 0.3, "algorithm": "entropy"},
    "LLaDA2.1 edit": {"threshold": 0.7, "edit_threshold": 0.9},
    "ReMDM cap 0.1": {"algorithm": "origin", "remask": "cap", "remask_eta": 0.1},
    "ReMDM conf": {"algorithm": "origin", "remask": "conf"},
    "guidance 0.5, threshold 0.9": {"threshold": 0.9, "cfg_scale": 0.5},
}
LONG_CANVAS = {
    "long: one token a pass, no cache": (None, {"cache": "none"}),
    "long: threshold 0.9, no cache": (None, {"threshold": 0.9, "cache": "none"}),
    "long: threshold 0.9, prefix cache": (None, {"threshold": 0.9, "cache": "prefix"}),
    "long: threshold 0.9, dual cache": (None, {"threshold": 0.9, "cache": "dual"}),
    "long: steady, dual cache": (None, {"algorithm": "steady", "cache": "dual"}),
    "long: block, one token a pass, no cache": ("block", {"cache": "none"}),
    "long: block, one token a pass": ("block", {}),
    "long: block, threshold 0.9": ("block", {"threshold": 0.9}),
    "long: block, steady": ("block", {"algorithm": "steady"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a finished training run")
    parser.add_argument("--data", default="builtin:quickstart_heldout")
    parser.add_argument("--rows", type=int, default=24, help="questions; 0: all")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="with --torch")
    parser.add_argument("--only", default="", help="words, separated by commas")
    parser.add_argument("--torch", action="store_true", help="the comparison with a plain torch loop instead")
    parser.add_argument("--dtype", default="", help="of our model, and of torch's; by default that of the run")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    questions = read_questions(arguments.data, arguments.rows)
    prompts = [question.messages for question in questions]
    lms = load_models(Path(arguments.run), arguments.max_new_tokens, arguments.dtype)
    if arguments.torch:
        table = against_torch(lms[None], prompts, arguments)
    else:
        table = samplers(lms, prompts, [q.reference for q in questions], arguments)
    if arguments.out:
        record = {"machine": machine(), "arguments": vars(arguments), "table": table}
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_models(run: Path, block_length: int, dtype: str) -> dict[str | None, LanguageModel]:
    """Loads the run's model with its own attention rule, and with `block` attention of `block_length`."""
    config = read_run_config(run)
    model, adapter = trained_model(run, config)
    lm = difflm_jax.load(model, adapter=adapter, dtype=dtype or config.dtype)
    lm = lm.merge() if adapter else lm
    return {None: lm, "block": lm.with_diffusion(attention="block", block_length=block_length)}


def samplers(lms, prompts, references, arguments) -> list[dict]:
    """Prints the table of all ways and returns it as records."""
    n, batch = arguments.max_new_tokens, arguments.batch_size
    ways: dict[str, Callable] = {}
    for name, options in ONE_BLOCK.items():
        options = {"algorithm": "probability", **options}
        steps = n // options.pop("passes", 1)
        ways[name] = lambda rows, of=1, o=options, s=steps: lms[None].generate(
            rows, n, max(2, s // of), batch_size=batch, **o
        )
    for name, (attention, options) in LONG_CANVAS.items():
        blocks = {} if attention else {"block_length": n}
        ways[name] = lambda rows, of=1, o={"algorithm": "probability", **options, **blocks}, a=attention: lms[
            a
        ].generate(rows, 8 * n, max(16, 8 * n // of), batch_size=batch, **o)
    words = [word for word in arguments.only.split(",") if word]
    wanted = [word for word in words if not word.startswith("-")]
    unwanted = [word[1:] for word in words if word.startswith("-")]
    ways = {
        name: way
        for name, way in ways.items()
        if (not wanted or any(word in name for word in wanted)) and not any(word in name for word in unwanted)
    }
    outputs, seconds = in_turns(ways, prompts, batch)
    texts = {name: [text for out in outs for text in out.texts] for name, outs in outputs.items()}
    first = {name.startswith("long"): found for name, found in reversed(texts.items())}
    print(f"  {'way':<42}{'exact match':>14}{'same':>6}{'passes':>8}{'tokens/pass':>13}{'tokens/s':>10}")
    records = []
    for name, outs in outputs.items():
        tokens = [sum(len(row) for row in out.tokens) for out in outs]
        matches = sum(normalised(a) == normalised(r) for a, r in zip(texts[name], references, strict=True))
        same = sum(a == b for a, b in zip(texts[name], first[name.startswith("long")], strict=True))
        passes = sum(int(out.steps.sum()) for out in outs)
        speed = statistics.median(t / s for t, s in zip(tokens, seconds[name], strict=True))
        record = {
            "way": name,
            "matches": matches,
            "questions": len(references),
            "same_as_first": same,
            "passes": passes / len(references),
            "tokens_per_pass": sum(tokens) / passes,
            "tokens_per_second": speed,
            "seconds": seconds[name],
        }
        records.append(record)
        share = f"{matches}/{len(references)} = {matches / len(references):.2f}"
        print(
            f"  {name:<42}{share:>14}{same:>6}{record['passes']:>8.2f}{record['tokens_per_pass']:>13.2f}{speed:>10.1f}",
            flush=True,
        )
    return records


def in_turns(ways: dict[str, Callable], prompts, batch: int) -> tuple[dict[str, list], dict[str, list[float]]]:
    """Returns (the outputs of each way, its seconds), batch by batch."""
    for name, way in ways.items():
        start = time.perf_counter()
        way(prompts[:batch], of=10**6)  # two passes a block: the program is that of any number
        print(f"  {name}: two passes a block, with compilation, {time.perf_counter() - start:.1f} s", flush=True)
    outputs, seconds = {name: [] for name in ways}, {name: [] for name in ways}
    for at in range(0, len(prompts), batch):
        for name, way in ways.items():
            start = time.perf_counter()
            outputs[name].append(way(prompts[at : at + batch]))
            seconds[name].append(time.perf_counter() - start)
    return outputs, seconds


def against_torch(lm: LanguageModel, prompts, arguments) -> list[dict]:
    """Compares transformers in a plain loop with our ways, on one batch with the same number of forward passes."""
    n, batch = arguments.max_new_tokens, arguments.batch_size
    rows = [lm.prompts.prompt(prompt) for prompt in prompts[:batch]]
    torch_loop = make_torch_loop(lm, rows, n)
    full = lm.with_model(lm.model.clone(attention="full"))
    same = {"max_new_tokens": n, "steps": n, "batch_size": batch, "stop_at_eos": False, "algorithm": "probability"}
    ways = {
        "torch + transformers, full attention": lambda: torch_loop(),
        "full attention, no cache": lambda: full.generate(rows, **same),
        "full attention, dual cache": lambda: full.generate(rows, cache="dual", **same),
        "prefix attention, exact cache": lambda: lm.generate(rows, **same),
    }
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        print(f"  {name}: first run {time.perf_counter() - start:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(1, arguments.rounds)):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    reference = statistics.median(seconds["torch + transformers, full attention"])
    print(f"  {n} passes over {batch} rows {'':<26}{'seconds':>9}{'times torch':>13}")
    records = []
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"  {name:<44}{median:>9.2f}{reference / median:>12.2f}x")
        records.append({"way": name, "seconds": times, "ratio": reference / median})
    return records


def make_torch_loop(lm: LanguageModel, rows: list[np.ndarray], new_tokens: int) -> Callable[[], np.ndarray]:
    """Returns a simple loop with transformers: whole canvas, all logits, LLaDA's rule, one token per pass."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, jnp.dtype(lm.model.dtype).name)
    with tempfile.TemporaryDirectory() as directory:
        lm.save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    width, mask_id = max(len(row) for row in rows) + new_tokens, lm.mask_token_id
    canvas = torch.full((len(rows), width), lm.pad_token_id)
    valid = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        start = width - new_tokens - len(row)
        canvas[i, start:], valid[i, start:] = torch.tensor([*row.tolist(), *[mask_id] * new_tokens]), True
    bias = torch.where(valid[:, None, None, :], 0.0, torch.finfo(dtype).min).expand(-1, 1, width, -1)
    positions = (valid.cumsum(1) - 1).clamp_min(0)

    first = width - new_tokens  # torch needs the softmax of the answer only

    @torch.inference_mode()
    def loop() -> np.ndarray:
        tokens = canvas.clone()
        for _ in range(new_tokens):
            logits = model(tokens, attention_mask=bias, position_ids=positions, use_cache=False).logits
            logits = logits[:, first - 1 : -1] if lm.logit_shift else logits[:, first:]
            logits[..., mask_id] = -torch.inf
            probability, chosen = torch.softmax(logits.float(), -1).max(-1)
            best = torch.where(tokens[:, first:] == mask_id, probability, -torch.inf).argmax(1, keepdim=True)
            tokens[:, first:].scatter_(1, best, chosen.gather(1, best))
        return tokens.numpy()

    return loop


def machine() -> dict:
    """Describes the machine and the versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    device = jax.devices()[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "device": device.device_kind, "jax": jax.__version__}


if __name__ == "__main__":
    main()
