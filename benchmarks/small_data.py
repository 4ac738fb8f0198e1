"""Sixty rows of one's own: `configs/small_data.py` next to a causal LoRA of torch + peft, on one budget of time.

    python -m benchmarks.small_data [--seconds=300] [--held=96] [--seed=0] [--rates=1e-3,...] [--config.KEY=...]

The rows are dates in words and their ISO form, made from `--seed`; no held-out date is a training row. A budget counts
from the start of a process: imports, weights, compilation, training and what is written. A short run of the recipe, not
counted, says how many of its steps the budget allows. The peer is what one writes with transformers and peft: the seven
projections at the same rank, 8 rows per step padded to the longest, a loss on answers, AdamW, warm-up and linear decay
over the budget, no checkpointing. It trains on all rows; the recipe keeps some for its own evaluations. Printed:
exact answers to the held-out questions, of the first 24 and of all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from difflm_jax.models.lora import ADAPTABLE

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
IRREGULAR = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
FORMS = ("the {day} of {month} {year}", "{month} the {day}, {year}", "{day} {month} {year}")
FIRST_DAY, LAST_DAY = np.datetime64("1910-01-01"), np.datetime64("2029-12-31")
ROWS, ASKED, NEW_TOKENS = 60, 24, 16
RATE, RANK, BATCH = 1e-3, 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--seconds", type=float, default=300, help="the budget of either side")
    parser.add_argument("--held", type=int, default=96, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of both trainings")
    parser.add_argument("--rates", default="1e-3", help="learning rates of the peer, one training each")
    parser.add_argument("--dtype", default="bfloat16", help="of the peer's frozen weights, and of answers")
    parser.add_argument("--only", default="", choices=("", "peer", "ours"))
    parser.add_argument("--out", default="", help="directory for small_data.json and small_data.png")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)  # the directory of the peer's process
    options, overrides = parser.parse_known_args()
    if options.peer:
        print(json.dumps(train_peer(Path(options.peer), options)))
        return
    found = []
    with tempfile.TemporaryDirectory() as directory:
        write_rows(Path(directory), options)
        if options.only != "peer":
            found += ours(Path(directory), options, overrides)
        if options.only != "ours":
            found += peers(Path(directory), options)
    report("small_data", options, found, f"exact_of_{ASKED}")


def in_words(date: np.datetime64, form: str) -> str:
    """Returns the date in words."""
    year, month, day = map(int, str(date).split("-"))
    return form.format(day=ordinal(day), month=MONTHS[month - 1], year=year_in_words(year))


def cardinal(number: int) -> str:
    """Returns a number below 100 in words."""
    if number < len(ONES):
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


def ordinal(number: int) -> str:
    first, dash, last = cardinal(number).rpartition("-")
    return first + dash + IRREGULAR.get(last, last.removesuffix("y") + ("ieth" if last.endswith("y") else "th"))


def year_in_words(year: int) -> str:
    century, rest = divmod(year, 100)
    if year // 10 == 200:
        return "two thousand" + (f" and {cardinal(rest)}" if rest else "")
    ending = "hundred" if not rest else f"oh {cardinal(rest)}" if rest < 10 else cardinal(rest)
    return f"{cardinal(century)} {ending}"


def dates(seed: int, count: int) -> list[dict[str, str]]:
    """Returns `count` different dates as rows of prompt and response, in an order drawn from `seed`."""
    generator = np.random.default_rng(seed)
    span = int((LAST_DAY - FIRST_DAY).astype(int)) + 1
    days = FIRST_DAY + generator.choice(span, count, replace=False)
    forms = generator.integers(len(FORMS), size=count)
    ask = "Write this date in ISO format: "
    return [
        {"prompt": ask + in_words(day, FORMS[form]), "response": str(day)}
        for day, form in zip(days, forms, strict=True)
    ]


def write_rows(directory: Path, options: argparse.Namespace) -> None:
    rows = dates(options.seed, ROWS + options.held)
    for name, part in (("train", rows[:ROWS]), ("held", rows[ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def read_rows(directory: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def ours(directory: Path, options: argparse.Namespace, overrides: list[str]) -> list[dict[str, Any]]:
    """Trains the recipe with its command and scores the held-out answers with each way of decoding."""
    import difflm_jax

    run = directory / "run"
    keys = {"model": options.model, "dataset": directory / "train.jsonl", "output_dir": run, "seed": options.seed}
    command = [sys.executable, "-m", "difflm_jax.train", "--config=configs/small_data.py"]
    command += [*(f"--config.{key}={value}" for key, value in keys.items()), *overrides]
    steps = affordable_steps(command, directory, options.seconds)
    seconds = timed([*command, f"--config.max_steps={steps}"], directory / "compiled")
    taken = {"train_seconds": seconds, "steps": metrics(run)[-1]["step"]}
    lm = difflm_jax.load(options.model, adapter=run / "sft_model", dtype=options.dtype)
    rows = read_rows(directory, "held")
    found = []
    for name, keywords in (("steady, the default", {}), ("left to right", {"algorithm": "left_to_right"})):
        out = lm.generate([row["prompt"] for row in rows], NEW_TOKENS, NEW_TOKENS, **keywords)
        passes = float(np.mean(out.steps))
        found.append({"way": f"difflm_jax, {name}", **score(rows, out.texts), "passes": passes, **taken})
    return found


def affordable_steps(command: list[str], directory: Path, budget: float, few: int = 12) -> int:
    """Estimates the steps that fit into the budget from a run of a few steps, with 5 % in reserve."""
    scratch = directory / "scratch"
    command = [*command, f"--config.max_steps={few}", f"--config.output_dir={scratch}"]
    whole = timed(command, directory / "scratch_compiled")
    step = [line["step_seconds"] for line in metrics(scratch) if "step_seconds" in line][-1]
    steps = int((0.95 * budget - (whole - few * step)) / step)
    print(f"{few} steps took {whole:.0f} s, {step:.2f} s a step: {steps} fit into {budget:.0f} s", flush=True)
    if steps < few:
        raise SystemExit("the budget is too small for a training on this machine: raise --seconds")
    return steps


def timed(command: list[str], compiled: Path) -> float:
    """Returns the seconds of a process whose compilation cache is `compiled`, initially empty."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compiled)})
    return time.perf_counter() - begun


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def score(rows: list[dict[str, str]], texts: list[str]) -> dict[str, int]:
    right = [text.strip() == row["response"] for row, text in zip(rows, texts, strict=True)]
    for row, text in list(zip(rows, texts, strict=True))[:5]:
        print(f"  {row['prompt']!r} -> {text!r}", flush=True)
    return {f"exact_of_{ASKED}": sum(right[:ASKED]), f"exact_of_{len(rows)}": sum(right)}


def peers(directory: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the peer in its own process, once for each learning rate."""
    import difflm_jax

    difflm_jax.load(options.model, dtype=options.dtype, causal=True).save_pretrained(directory / "base")
    found = []
    for rate in options.rates.split(","):
        flags = [f"--peer={directory}", f"--rates={rate}", f"--seconds={options.seconds}", f"--seed={options.seed}"]
        flags += [f"--dtype={options.dtype}", f"--held={options.held}"]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.small_data", *flags], check=True, stdout=subprocess.PIPE, text=True
        )
        *shown, result = done.stdout.splitlines()
        print("\n".join(shown), flush=True)
        found.append(json.loads(result))
    return found


def train_peer(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains until the budget of this process is spent, then answers greedily."""
    begun = time.time() - process_age()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(options.seed)
    rate = float(options.rates)
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=getattr(torch, options.dtype))
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(ADAPTABLE))
    model = get_peft_model(base, lora).train()  # the adapter's own weights are float32
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rows = [encoded(tokenizer, row) for row in read_rows(directory, "train")]
    generator = np.random.default_rng(options.seed)
    steps, order = 0, np.zeros(0, int)
    while (spent := (time.time() - begun) / options.seconds) < 1:
        if len(order) < BATCH:
            order = np.concatenate([order, generator.permutation(len(rows))])
        batch, order = [rows[i] for i in order[:BATCH]], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 10) * (1 - spent)
        width = max(len(tokens) for tokens, _ in batch)
        tokens = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([[-100] * start + row[start:] + [-100] * (width - len(row)) for row, start in batch])
        seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=tokens, attention_mask=seen, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    seconds = time.time() - begun
    model.eval()
    asked, texts = read_rows(directory, "held"), []
    for row in asked:
        prompt = torch.tensor([encoded(tokenizer, {**row, "response": None})[0]])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            out = model.generate(input_ids=prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
    way = f"torch + peft, causal, learning rate {rate:g}"
    return {"way": way, **score(asked, texts), "passes": "", "train_seconds": seconds, "steps": steps}


def encoded(tokenizer: Any, row: dict[str, str | None]) -> tuple[list[int], int]:
    """Tokenises a row with the chat template: (tokens, start of the answer). Without a response, only the prompt."""
    asked = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    answer = [] if row["response"] is None else tokenizer(row["response"], add_special_tokens=False).input_ids
    return tokens + answer + ([tokenizer.eos_token_id] if answer else []), len(tokens)


def process_age() -> float:
    """Returns the seconds since this process began, because its imports count against the budget."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
