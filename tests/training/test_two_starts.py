"""Two real processes that start one run at the same time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from difflm_jax.train import command
from tests.tiny_run import make_model, make_rows, results, train_arguments

PROJECT = Path(__file__).parents[2]
# The training command, which stops between its first look at the run directory and the lock until another has trained.
SLOW_START = """
import sys, time
from pathlib import Path
from difflm_jax.train import command
from difflm_jax.training import run

looked, trained = Path(sys.argv[1]), Path(sys.argv[2])
plain = run.check_kernel

def waiting(*arguments):
    looked.touch()
    for _ in range(2400):
        if trained.exists():
            break
        time.sleep(0.05)
    return plain(*arguments)

run.check_kernel = waiting
sys.exit(command(sys.argv[3:]))
"""
SHORT = ("--config.phases=sft", "--config.max_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ((), 0, "sft: finished already"),
        (("--config.learning_rate=0.5",), 1, "holds a run with another configuration (learning_rate"),
    ],
    ids=["the same", "another learning rate"],
)
def test_a_start_that_gets_the_lock_after_another_has_trained_looks_again(changed, status, said, tmp_path, capfd):
    """Regression: it had seen an empty directory, and trained into the finished run of another configuration."""
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.jsonl", 12)
    arguments = train_arguments(model, rows, tmp_path, *SHORT)
    looked, trained = tmp_path / "looked", tmp_path / "trained"
    slow = subprocess.Popen(
        [sys.executable, "-c", SLOW_START, looked, trained, *arguments, *changed],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while not looked.exists():
            assert slow.poll() is None, slow.stdout.read()
            time.sleep(0.05)
        assert not (tmp_path / "run").exists()
        assert command(arguments) == 0, capfd.readouterr().err
        before = results(tmp_path / "run")
        trained.touch()
        output, _ = slow.communicate(timeout=120)
    finally:
        slow.kill()
    assert slow.returncode == status, output
    assert said in output
    assert results(tmp_path / "run") == before
