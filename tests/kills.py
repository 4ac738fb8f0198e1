"""A two-phase run that is killed at seeded moments, some inside a save, and must end in the bits of an undisturbed one.

    python -m tests.kills --kills=50 --seed=0

It has a base in NF4, packed rows, dropout and accumulation. Each life of the run is a process forked off this one,
which has the imports done and no devices touched yet, and dies by SIGKILL: at a random moment, or (every third time)
while the directory of a checkpoint that is being written is there. A run that reaches its end is compared, and the
remaining kills go to another one.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from difflm_jax import train
from tests.tiny_run import NF4_PACKED, make_model, make_rows, results, train_arguments

LIFE = 6.0  # seconds within which a random kill falls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = kill_and_compare(Path(directory), options.kills, options.seed)
    print(json.dumps(report, indent=2))
    return 0 if report["equal"] == report["runs"] else 1


def kill_and_compare(directory: Path, kills: int, seed: int) -> dict[str, int]:
    """Counts of kills, of those inside a save, of lives and runs, and of runs whose results are equal to the bit."""
    draw = random.Random(seed)
    model = _in_child(lambda: bool(make_model(directory / "model"))) and directory / "model"
    rows = make_rows(directory / "rows.jsonl")
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled"))

    def life(name: str) -> int:
        arguments = train_arguments(model, rows, directory / name, f"--config.cache_dir={directory / 'cache'}",
                                    *NF4_PACKED, "--config.eval_interval=1")  # fmt: skip
        return _fork(lambda: train.command(arguments), directory / f"{name}.log", compiled)

    assert _wait(life("undisturbed")) == 0, (directory / "undisturbed.log").read_text()
    expected = results(directory / "undisturbed" / "run")

    report = {"kills": 0, "inside_a_save": 0, "lives": 0, "runs": 0, "equal": 0}
    while report["kills"] < kills or not report["runs"]:
        name = f"run{report['runs']}"
        while True:
            report["lives"] += 1
            child = life(name)
            if report["kills"] < kills and _kill(child, directory / name / "run", draw, report):
                continue
            status = _wait(child)
            assert status == 0, (directory / f"{name}.log").read_text()[-3000:]
            break
        report["runs"] += 1
        report["equal"] += results(directory / name / "run") == expected
    return report


def _kill(child: int, run: Path, draw: random.Random, report: dict[str, int]) -> bool:
    """Kills the process at a moment that `draw` chooses; False if it ended by itself before."""
    in_save = report["kills"] % 3 == 0
    deadline = time.monotonic() + (60.0 if in_save else draw.uniform(0.2, LIFE))
    saves_seen, wanted = set(), draw.randint(1, 3)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _ended[child] = status
            return False
        writing = {str(path) for path in run.glob("checkpoints/*/*tmp*")}
        saves_seen |= writing
        if in_save and writing and len(saves_seen) >= wanted:
            break
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    report["kills"] += 1
    report["inside_a_save"] += bool(list(run.glob("checkpoints/*/*tmp*")))
    return True


_ended: dict[int, int] = {}  # child -> what waitpid said of it, which it says only once


def _wait(child: int) -> int:
    """The exit status of a child, when it has ended."""
    return os.waitstatus_to_exitcode(_ended.pop(child) if child in _ended else os.waitpid(child, 0)[1])


def _fork(main, log: Path, compiled: str) -> int:
    """The pid of a child that runs `main` with its output in `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    with contextlib.suppress(BaseException):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        import jax

        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        status = main()
        sys.stdout.flush()
    os._exit(status)


def _in_child(main) -> bool:
    child = os.fork()
    if not child:
        os._exit(0 if main() else 1)
    return _wait(child) == 0


if __name__ == "__main__":
    sys.exit(main())
