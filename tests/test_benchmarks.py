"""Benchmarks are not run here, but a name that they import may move."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # some are run as scripts, and import each other so
    importlib.import_module(f"benchmarks.{path.stem}")


@pytest.mark.slow
def test_what_is_measured_on_a_card_runs_at_small_sizes(tmp_path):
    """Rows and one training step of a tiny model in their own processes; stages without their files are named."""
    model, out = save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=128), tmp_path / "out"
    flags = [f"--out={out}", f"--model={model}", "--only=rows,train,moe", "--counts=1,4"]
    flags += ["--ways=lora attention_kernel=xla dtype=float32", "--rows=2", "--length=16"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.card", *flags], capture_output=True, text=True)
    stages = json.loads((out / "stages.json").read_text())
    assert done.returncode == 0, (stages, (out / "train.txt").read_text())
    assert [stages[name].get("exit_status") for name in ("rows", "train")] == [0, 0]
    assert stages["moe"] == {"left_out": "no --moe"}
    assert json.loads((out / "rows.json").read_text())["ways"][1]["rows"] == 4
    assert json.loads((out / "accelerator.json").read_text())["ways"][0]["seconds_per_step"] > 0
