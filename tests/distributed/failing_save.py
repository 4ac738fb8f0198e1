"""Saves two checkpoints in two processes. One process cannot write the first: its disk refuses files.

python -m tests.distributed.failing_save DIRECTORY PROCESS --coordinator_address=... --num_processes=2 --process_id=...
"""

import resource
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from difflm_jax.distributed.processes import connect, told_by_one_process
from difflm_jax.training.checkpoints import Checkpoints


def main(directory: str, process: str, *flags: str) -> None:
    named = dict(flag.removeprefix("--").split("=") for flag in flags)
    connect(named["coordinator_address"], int(named["num_processes"]), int(named["process_id"]))
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    numbers = np.random.default_rng(0).normal(size=(2, 1 << 16)).astype(np.float32)  # 256 KB each, incompressible
    state = {"w": jax.make_array_from_callback(numbers.shape, sharding, lambda part: jnp.asarray(numbers[part]))}
    checkpoints = Checkpoints(directory, keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(process) == jax.process_index():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoints._has_room = lambda step, state: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1])) or True
    checkpoints.save(1, state)
    checkpoints.settle()
    checkpoints.__dict__.pop("_has_room", None)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.save(2, state)
    assert told_by_one_process(lambda: {"from": jax.process_index()}, "it") == {"from": 0}
    print(f"process {jax.process_index()} has {checkpoints.steps()}", file=sys.stderr, flush=True)
    checkpoints.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
