"""Several processes, one per host or per device, that work as one: how they join, agree and write.

Everything that a run reads and writes is where every process sees it. Process 0 alone writes logs, metrics, what a
phase trained and the terminal. All processes write checkpoints, each its part.
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

_REASON_BYTES = 200  # of a failure that a process tells the others


def connect(coordinator_address: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes, if there are any; call it before anything touches a device.

    Without arguments Cloud TPU, SLURM and Open MPI are asked. Raises `UserError` for arguments that do not belong
    together and for a coordinator that cannot be reached.
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
    """Whether this is the process that writes what is written once: logs, metrics, what a phase trained."""
    return jax.process_index() == 0


def agreed(here: bool) -> bool:
    """Whether something holds in every process (which must all ask)."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


def failure_of_any(reason: str | None) -> str | None:
    """The first reason that a process has for a failure (which all must ask for); None if none has one."""
    if jax.process_count() == 1:
        return reason
    cut = b"" if reason is None else b"!" + reason.encode()[:_REASON_BYTES]
    here = np.frombuffer(cut.ljust(_REASON_BYTES + 1, b"\0"), np.uint8)
    everywhere = [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(here)]
    reasons = [(index, found[1:].decode(errors="ignore")) for index, found in enumerate(everywhere) if found]
    told = next(((index, text) for index, text in reasons if text), None)  # "" of those that know nothing
    return f"process {told[0]}: {told[1]}" if told else "" if reasons else None


def wait_for_all(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def by_one_process(write: Callable[[], None], what: str) -> None:
    """Calls `write` in process 0 while the others wait; a failure there is a failure in all of them.

    `what` names what is written. Process 0 raises what `write` raises, the others raise `UserError`.
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
    """What `make` returns in process 0 (anything that JSON can hold), in every process; fails as `by_one_process`."""
    if jax.process_count() == 1:
        return make()
    made: list[bytes] = []
    by_one_process(lambda: made.append(json.dumps(make()).encode()), what)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(made[0]) if made else 0)))
    text = np.frombuffer(made[0], np.uint8) if made else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8).tobytes())


def _on_a_cluster(environment: dict[str, str] | os._Environ) -> bool:
    """Whether a launcher that jax knows has started several processes, or this is a Cloud TPU."""
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if environment.get(variable, "").isdecimal() and int(environment[variable]) > 1:
            return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True  # GKE, and several slices
    tpu_wanted = "tpu" in environment.get("JAX_PLATFORMS", "tpu")
    return tpu_wanted and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()) and _has_libtpu()


def _quieten() -> None:
    """Leaves standard output to process 0 and to this program's own prints: libraries print there too."""
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
    """Hides HTTP proxies from gRPC, which would send even a neighbour's messages there and wait for ever."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)
