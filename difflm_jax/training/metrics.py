"""The metrics of a run: `metrics.jsonl`, one record per line."""

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difflm_jax.errors import UserError, one_line
from difflm_jax.utils.files import write_whole

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"


class MetricsLog:
    """Appends records to `output_dir/metrics.jsonl` (or another `name`). The first record creates the directory.

    Every line is strict JSON. JSON lacks NaN and infinities, so they are written as the strings "NaN", "Infinity" and
    "-Infinity", which `float` reads back: the log shows a run that has diverged. null means that a value does not
    exist, such as the accuracy if no token was masked.

    If the disk refuses a write, lines wait in memory, and the next call tries again. With `enabled=False` nothing is
    written: only one of several processes writes.
    """

    def __init__(self, output_dir: str | Path, name: str = METRICS_FILE, enabled: bool = True):
        self.path = Path(output_dir) / name
        self._enabled = enabled
        self._waiting: list[str] = []
        self._refused = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes `record` as one line. Scalars of NumPy and JAX are written as numbers."""
        if self._enabled:
            self._waiting.append(json.dumps(_plain(record), allow_nan=False, ensure_ascii=False) + "\n")
            self.flush()

    def flush(self) -> bool:
        """Writes waiting lines; returns whether every line is in the file now. Prints the first failure and its end."""
        if not self._waiting:
            return True
        data = "".join(self._waiting).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if (written := file.write(data)) < len(data):
                    file.truncate(size)  # no torn lines
                    raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes fit")
        except OSError as error:
            if not self._refused:
                print(f"{self.path}: cannot be written, lines wait in memory ({one_line(error)})", flush=True)
            self._refused = True
            return False
        if self._refused:
            print(f"{self.path}: can be written again", flush=True)
        self._refused = False
        self._waiting = []
        return True

    def cut_back(self, phase_order: Sequence[str], phase: str, step: int, evaluated: bool = True) -> None:
        """Drops what a run that resumes at `step` of `phase` will write again.

        Keeps the records of earlier phases and those of `phase` up to `step`, but not the evaluation at `step` if
        `evaluated` is False. Drops records without a phase of `phase_order` (a report at the end), and an incomplete
        last line. If everything is kept, the file is not written.
        """
        if not self._enabled or not self.path.exists():
            return
        place = {name: index for index, name in enumerate(phase_order)}
        end = (place[phase], step)

        def kept(record: Mapping[str, Any]) -> bool:
            if record.get("phase") not in place:
                return False
            at = (place[record["phase"]], record.get("step", math.inf))
            return at < end or (at == end and (evaluated or "loss" in record or "nonfinite" in record))

        text = self.path.read_text(encoding="utf-8")
        lines = [line for line, record in _parse(self.path, text) if kept(record)]
        shortened = "".join(line + "\n" for line in lines)
        if shortened != text:
            write_whole(self.path, shortened)


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a run in order, without an incomplete last line. NaN and infinities are numbers again.

    Raises `UserError` if the file cannot be read or is not such a log.
    """
    path = Path(output_dir) / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return [_restored(record) for _, record in _parse(path, text)]


def _parse(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns [(line, record)]. Text after the last newline is an incomplete line and left out."""
    pairs = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); move the file away to start anew") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a metrics record; move the file away to start anew")
        pairs.append((line, record))
    return pairs


def _plain(value: Any) -> Any:
    """Converts `value` to JSON's types, with non-finite numbers as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    """Inverts `_plain`: turns strings of non-finite numbers back into numbers."""
    if isinstance(value, dict):
        return {key: _restored(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_restored(inner) for inner in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
