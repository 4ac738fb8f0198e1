"""4x4 Sudoku, where the order of decoding matters, learned by diffusion and by next-token prediction.

    python benchmarks/sudoku.py --way=diffusion [--steps=200] [--out=runs/sudoku] [key=value ...]
    python benchmarks/sudoku.py --way=causal

72 of the 288 grids (by `--seed`) are held out for test puzzles; training puzzles are the others, with 8 empty cells.
No training puzzle has a held-out grid as a solution. Trains the quickstart's model on 8 puzzles per step, then runs
`difflm_jax.evaluate --task=sudoku` on the first `--rows` test puzzles, also with the untrained base.
`causal` trains the same adapter on the same rows as block diffusion with blocks of one token and the shift, which is
next-token prediction, and decodes one token per pass. The same command resumes.
"""

import argparse
import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from difflm_jax.config.files import load_config
from difflm_jax.evaluation.tasks import read_questions
from difflm_jax.training.run import train

EMPTY, HELD_OUT = 8, 72
PER_STEP = 8
CANVAS = 32  # 16 digits, the characters between them, and the end
SHARED = {
    "phases": "sft",
    "max_length": 640,  # the shared start of all prompts, and the rest of `PER_STEP` puzzles
    "answer_padding": 0,
    "test_size": 0,
    "sample_prompts": 0,
    "report.data": "",
    "min_mask_probability": 0.1,
    "epochs": 1,
}
NEXT_TOKEN = {
    "attention": "block",
    "block_length": 1,
    "mask_rate": "block",
    "min_mask_probability": 1.0,
    "loss_weight": "uniform",  # by CART's weights a token would count the less the further it is from the prompt
}
# Way of training -> (config keys, tokens per pass for decoding).
WAYS = {"diffusion": ({}, "1,2,4"), "causal": (NEXT_TOKEN, "1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=list(WAYS), required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sudoku"))
    parser.add_argument("changes", nargs="*", help="key=value")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, test = options.out / "train.jsonl", options.out / "test.csv"
    changes, tokens_per_pass = WAYS[options.way]
    steps = {"sft.max_steps": options.steps, "seed": options.seed}
    run = options.out / options.way
    keys = {**SHARED, **changes, **steps, "dataset": rows, "output_dir": run}
    overrides = [*(f"{key}={value}" for key, value in keys.items()), *options.changes]
    config = load_config("configs/quickstart.py", overrides)
    write_puzzles(rows, test, PER_STEP * options.steps, options.rows, options.seed)
    train(config)
    flags = {
        "run": run, "task": "sudoku", "data": test, "max_new_tokens": CANVAS, "tokens_per_pass": tokens_per_pass,
        "out": run / "scores.json",
    }  # fmt: skip
    command = [sys.executable, "-m", "difflm_jax.evaluate", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(command, check=True)


def write_puzzles(rows: Path, test: Path, train_count: int, test_count: int, seed: int) -> None:
    """Writes the test puzzles as the task's CSV, and the training puzzles as chats with the same prompt as the task."""
    rng = np.random.default_rng(seed)
    grids = rng.permutation(all_grids())
    write_csv(test, [puzzle_of(grids[i % HELD_OUT], rng) for i in range(test_count)])
    kept = grids[HELD_OUT:]
    write_csv(rows.with_suffix(".csv"), [puzzle_of(kept[rng.integers(len(kept))], rng) for _ in range(train_count)])
    with rows.open("w", encoding="utf-8") as file:
        for question in read_questions(str(rows.with_suffix(".csv")), task="sudoku"):
            messages = [*question.messages, {"role": "assistant", "content": question.reference}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_csv(path: Path, puzzles: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("Puzzle", "Solution"), *puzzles])


def all_grids() -> np.ndarray:
    """Returns all grids [288, 16], row by row, with 1 to 4 in each row, column and quarter."""
    lines = list(itertools.permutations((1, 2, 3, 4)))
    found = np.array([sum(rows, ()) for rows in itertools.product(lines, repeat=4)]).reshape(-1, 4, 4)
    found = found[(np.sort(found, axis=1) == np.arange(1, 5)[:, None]).all(axis=(1, 2))]
    quarters = found.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    return found[(np.sort(quarters, axis=2) == np.arange(1, 5)).all(axis=(1, 2))].reshape(-1, 16)


def puzzle_of(grid: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Returns (puzzle, a solution), each with 16 digits."""
    puzzle = grid.copy()
    puzzle[rng.choice(16, EMPTY, replace=False)] = 0
    return "".join(map(str, puzzle)), "".join(map(str, grid))


if __name__ == "__main__":
    main()
