"""Writes results files: the command, the environment and all results."""

import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from difflm_jax.utils.files import write_whole

_PACKAGES = ("difflm_jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


def environment() -> dict[str, Any]:
    """Returns the command, the time, the package versions and the device of this process."""
    devices = jax.devices()
    return {
        "command": sys.argv,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "machine": platform.platform(),
    }


def write_results(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes `environment()`, followed by `record`, as JSON."""
    write_whole(
        path,
        json.dumps({**environment(), **record}, indent=2, ensure_ascii=False, default=_plain) + "\n",
    )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
