"""A whole run of the training command that sends itself SIGTERM when it has seen a number of steps.

Where several run to their end (99 steps), the disk of the last one is full when its second checkpoint is due.

python -m tests.multi_device.whole_run STOP_AFTER STOPPED_PROCESS MODEL ROWS DIRECTORY [--flag=value ...]
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from difflm_jax.train import command
from difflm_jax.training import loop
from difflm_jax.training.checkpoints import Checkpoints
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


def full_disk(plain: Callable[..., None], at: int) -> Callable[..., None]:
    """`Checkpoints.save` on a disk that takes no file above 4 KB while the first save behind `at` saves is made."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    saves = []

    def save(self, *arguments):
        saves.append(1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(saves) == at + 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            plain(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return save


def main(steps: str, process: str, model: str, rows: str, directory: str, *more: str) -> int:
    if f"--process_id={process}" in more or not any(flag.startswith("--process_id") for flag in more):
        # Processes need some time to agree on where to stop, which a run of tiny steps does not give them.
        pause = 0.8 if int(process) and int(steps) < 99 else 0.0
        loop.Meter.add = stopping(loop.Meter.add, int(steps), pause)
        if int(process) and int(steps) >= 99:
            Checkpoints.save = full_disk(Checkpoints.save, at=0)
    return command(train_arguments(Path(model), Path(rows), Path(directory), *more))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
