"""Runs a function in a fresh process with a given number of virtual CPU devices."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def on_devices():
    """`on_devices(count, code)` runs `code` with `count` virtual devices and returns what it prints."""

    def run(count: int, code: str) -> str:
        environment = {
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}",
            "JAX_PLATFORMS": "cpu",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
