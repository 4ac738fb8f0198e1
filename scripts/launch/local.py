#!/usr/bin/env python3
"""Starts a command as several processes on this machine that work as one, joined over loopback.

    python scripts/launch/local.py --processes=2 [--devices=4] -- python -m difflm_jax.train --config=...

Each gets `--coordinator_address`, `--num_processes` and `--process_id` behind its own flags. `--devices`: so many
virtual CPU devices each (without it: what there is; on one GPU machine one process is enough). Output of process 0 is
shown, and every process's errors. SIGTERM is passed on; when one process fails, the others are stopped. Exit status:
the first that is not 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("--grace", type=float, default=10, help="seconds that the others have after a failure")
    options = parser.parse_args(own)
    if not command:
        parser.error("name the command behind --")
    environment = dict(os.environ)
    if options.devices:
        environment["JAX_PLATFORMS"] = "cpu"
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}".strip()
    address = f"127.0.0.1:{_free_port()}"
    processes = [
        subprocess.Popen(
            [
                *command,
                f"--coordinator_address={address}",
                f"--num_processes={options.processes}",
                f"--process_id={index}",
            ],
            env=environment,
        )
        for index in range(options.processes)
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: [process.send_signal(received) for process in processes])
    return _wait(processes, options.grace)


def _wait(processes: list[subprocess.Popen], grace: float) -> int:
    """The first exit status that is not 0; the others have then `grace` seconds to end by themselves."""
    while None in (statuses := [process.poll() for process in processes]):
        failed = [status for status in statuses if status]
        if failed:
            deadline = time.monotonic() + grace
            for process in processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            return failed[0]
        time.sleep(0.05)
    return next((process.returncode for process in processes if process.returncode), 0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
