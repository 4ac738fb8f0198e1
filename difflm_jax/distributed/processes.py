"""Several processes, one a host or a device, that work as one: found by themselves on a cluster, or told by flags.

Everything that a run reads and writes lies where every process sees it. Process 0 alone writes logs, metrics,
what a phase trained and the terminal; checkpoints are written by all, each its part.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from difflm_jax.errors import UserError, one_line


def define_host_flags(flag_values: flags.FlagValues) -> None:
    """The flags that name the other processes; without them Cloud TPU, SLURM and Open MPI are asked."""
    flags.DEFINE_string(
        "coordinator_address", "", "host:port of process 0, where there are several.", flag_values=flag_values
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=flag_values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=flag_values)


def connect(flag_values: flags.FlagValues) -> None:
    """Joins the other processes, if there are any; before anything touches a device.

    Raises `UserError` for flags that do not belong together and for a coordinator that cannot be reached.
    """
    named = {name: flag_values[name].value for name in ("coordinator_address", "num_processes", "process_id")}
    given = [name for name, value in named.items() if value not in ("", None)]
    if given and len(given) < 3:
        missing = ", ".join(f"--{name}" for name in named if name not in given)
        raise UserError(f"--{given[0]} needs {missing} too: every process is told all three")
    if given:
        count, index = named["num_processes"], named["process_id"]
        if count < 1 or not 0 <= index < count:
            raise UserError(f"--process_id={index}: must be at least 0 and below --num_processes={count}")
        if count > 1:
            _initialise(**named)
    elif _on_a_cluster(os.environ):
        _initialise()
    if jax.process_count() > 1:
        _quieten()


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
    """Leaves standard output to process 0 and to what this program prints: libraries underneath print there too."""
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
    """gRPC sends even what is meant for a neighbour through an HTTP proxy, where it waits for ever."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)
