"""A whole run of the training command that sends itself SIGTERM when it has seen a number of steps.

python -m tests.multi_device.whole_run STOP_AFTER STOPPED_PROCESS MODEL ROWS DIRECTORY [--flag=value ...]
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from difflm_jax.train import command
from difflm_jax.training import loop
from tests.tiny_run import train_arguments


def stopping(plain: Callable[..., None], steps: int, pause: float = 0.0) -> Callable[..., None]:
    """`Meter.add` with SIGTERM while the metrics of step number `steps` are read; each step takes `pause` more."""
    seen = []

    def add(self, *arguments):
        seen.append(1)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        return plain(self, *arguments)

    return add


def main(steps: str, process: str, model: str, rows: str, directory: str, *more: str) -> int:
    if f"--process_id={process}" in more or not any(flag.startswith("--process_id") for flag in more):
        # Processes need some time to agree on where to stop, which a run of tiny steps does not give them.
        pause = 0.8 if int(process) and int(steps) < 99 else 0.0
        loop.Meter.add = stopping(loop.Meter.add, int(steps), pause)
    return command(train_arguments(Path(model), Path(rows), Path(directory), *more))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
