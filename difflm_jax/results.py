"""A results file: what was run, on what, and everything that came out of it; written whole or not at all."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from difflm_jax.errors import UserError, one_line

_PACKAGES = ("difflm_jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


def environment() -> dict[str, Any]:
    """The command, the time, and the versions and device that the figures are of."""
    devices = jax.devices()
    return {
        "command": sys.argv,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "machine": platform.platform(),
    }


def check_writable(path: str | Path) -> None:
    """Raises `UserError` if no file could be written there: before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory, not a file to write")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written ({path.parent} is no directory that can be written to)")


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Replaces the file `path` by `data`, so that a reader sees the old or the new one. Raises `UserError`."""
    path = Path(path)
    if isinstance(data, str):
        data = data.encode("utf-8", "backslashreplace")  # half a surrogate pair of some row: JSON's escape of it
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).chmod(0o666 & ~_umask())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from error


def write_results(path: str | Path, record: Mapping[str, Any]) -> None:
    """`record` behind its `environment()`, as JSON."""
    write_whole(path, json.dumps({**environment(), **record}, indent=2, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
