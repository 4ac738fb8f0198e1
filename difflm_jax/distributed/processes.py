"""Runs with several processes, one per host or per device: how they join, agree and write.

All processes must see the files that a run reads and writes. Only process 0 writes logs, metrics, trained adapters and
to the terminal. All processes write checkpoints, each its own part.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from difflm_jax.errors import UserError, one_line

_REASON_BYTES = 200  # longest failure that a process sends to the others


def connect(coordinator_address: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes, if there are any. Call it before anything uses a device.

    Without arguments, Cloud TPU, SLURM and Open MPI are detected from the environment. Raises `UserError` if only some
    arguments are given, if `process_id` is out of range, and if the coordinator cannot be reached.
    """
    named = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    given = [name for name, value in named.items() if value not in ("", None)]
    if given and len(given) < 3:
        missing = ", ".join(f"--{name}" for name in named if name not in given)
        raise UserError(f"--{given[0]} needs {missing} too: every process is told all three")
    if given:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id}: must be at least 0 and below --num_processes={num_processes}")
        if num_processes > 1:
            _initialise(**named)
    elif _on_a_cluster(os.environ):
        _initialise()
    if jax.process_count() > 1:
        _quieten()


def is_writer() -> bool:
    """Whether this is the process that writes logs, metrics and trained adapters."""
    return jax.process_index() == 0


def agreed(here: bool) -> bool:
    """Returns whether `here` is true in every process. All processes must call this."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


def failure_of_any(reason: str | None) -> str | None:
    """Returns the first failure in any process, as "process N: reason"; None if none failed. All must call this.

    `reason` is None in a process that did not fail; reasons are cut to 200 bytes. The result is "" if all reasons are
    empty. A single process gets its own reason back.
    """
    if jax.process_count() == 1:
        return reason
    cut = b"" if reason is None else b"!" + reason.encode()[:_REASON_BYTES]
    here = np.frombuffer(cut.ljust(_REASON_BYTES + 1, b"\0"), np.uint8)
    everywhere = [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(here)]
    reasons = [(index, found[1:].decode(errors="ignore")) for index, found in enumerate(everywhere) if found]
    told = next(((index, text) for index, text in reasons if text), None)  # "": failed, reason unknown
    return f"process {told[0]}: {told[1]}" if told else "" if reasons else None


def wait_for_all(what: str) -> None:
    """Waits until every process has called this. `what` names the barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def by_one_process(write: Callable[[], None], what: str) -> None:
    """Calls `write` in process 0 while the others wait. If it fails there, all processes fail.

    `what` names the thing written. Process 0 raises the error of `write`; the others raise `UserError`.
    """
    error = None
    if is_writer():
        try:
            write()
        except Exception as found:
            error = found
    if not agreed(error is None):
        raise error or UserError(f"{what}: process 0 could not write it, and says why")


def told_by_one_process(make: Callable[[], Any], what: str) -> Any:
    """Returns, in every process, what `make` returns in process 0 (a JSON value). Fails as `by_one_process` does."""
    if jax.process_count() == 1:
        return make()
    made: list[bytes] = []
    by_one_process(lambda: made.append(json.dumps(make()).encode()), what)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(made[0]) if made else 0)))
    text = np.frombuffer(made[0], np.uint8) if made else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8).tobytes())


def _on_a_cluster(environment: dict[str, str] | os._Environ) -> bool:
    """Whether a launcher known to jax has started several processes, or this is a Cloud TPU."""
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if environment.get(variable, "").isdecimal() and int(environment[variable]) > 1:
            return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True  # GKE, or several slices
    tpu_wanted = "tpu" in environment.get("JAX_PLATFORMS", "tpu")
    return tpu_wanted and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()) and _has_libtpu()


def _quieten() -> None:
    """Reserves standard output for this program's prints in process 0. Output of libraries goes to standard error."""
    ours = os.dup(1) if jax.process_index() == 0 else os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding="utf-8", errors="replace")


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def _initialise(**named: str | int) -> None:
    try:
        with _without_proxies():
            jax.distributed.initialize(**named)
    except (RuntimeError, ValueError) as error:
        where = named.get("coordinator_address", "the cluster's coordinator")
        raise UserError(f"{where}: the processes cannot be joined ({one_line(error)[:300]})") from error


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hides HTTP proxies from gRPC, which would send even messages to a neighbour through them and wait forever."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)
