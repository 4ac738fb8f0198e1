"""Checks whether a run directory can be resumed: with the same configuration and data, or which ones have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ml_collections import ConfigDict

from difflm_jax.checkpoint.safetensors import read_json
from difflm_jax.config.files import difference, load_run_config, to_json
from difflm_jax.data.examples import PHASES
from difflm_jax.data.stored import tables
from difflm_jax.distributed.processes import agreed, by_one_process, told_by_one_process
from difflm_jax.errors import UserError, one_line
from difflm_jax.utils.dtypes import AUTO, fastest_dtype
from difflm_jax.utils.files import write_whole
from difflm_jax.utils.locks import FileLock

if TYPE_CHECKING:
    import datasets

CONFIG_FILE, DATA_FILE, LOCK_FILE = "config.json", "checkpoints/data.json", "run.lock"
SETTINGS_FILE = "training_config.json"  # in the model directory of a phase: the last file that is written
FORCE = "--force"

# Keys that affect where and how fast a run trains, and what it reports, but no number that it trains with.
_FREE = (
    "output_dir", "mesh.", "cache_dir", "dataloader_num_workers", "pin_memory", "keep_checkpoints", "profile.",
    "heartbeat_seconds",
    "wandb_config.", "log_interval", "report.", "remat", "attention_kernel", "loss_chunk", "max_nonfinite_steps",
    "unroll_layers", "draft.keep_gib",
)  # fmt: skip


class RunLock:
    """Ensures that at most one run trains into a directory: process 0 has a lock there for all processes of its run."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._lock = FileLock(directory / LOCK_FILE)
        self._made_directory = False

    def take(self) -> None:
        """Creates the directory and takes its lock. Raises `UserError` that names the holder if it is taken."""
        by_one_process(self._take, str(self._directory))

    def _take(self) -> None:
        try:
            self._made_directory |= not self._directory.is_dir()
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir={self._directory}: cannot be made ({one_line(error)})") from error
        if not self._lock.acquire(wait=False):
            raise UserError(
                f"{self._directory}: {self._lock.holder()} trains into it right now; wait for its end, or choose "
                "another output_dir"
            )

    def release(self) -> None:
        """Releases the lock, and removes the directory if this run created it and wrote nothing into it."""
        self._lock.release()
        if self._made_directory:
            with contextlib.suppress(OSError):
                self._directory.rmdir()


def is_finished(target: Path) -> bool:
    """Whether the directory `target` has the complete model of a phase."""
    return (target / SETTINGS_FILE).is_file()


def settle_dtype(config: ConfigDict) -> ConfigDict:
    """Returns `config` with dtype "auto" replaced: by that of the resumed run, else by the machine's fastest."""
    if config.dtype != AUTO:
        return config
    begun = Path(config.output_dir) / CONFIG_FILE
    settled = config.copy_and_resolve_references()
    with settled.unlocked():
        settled.dtype = load_run_config(begun).dtype if begun.is_file() else fastest_dtype()
    print(f"dtype: {settled.dtype}")
    return settled.lock()


def check_config(directory: Path, config: ConfigDict, force: bool) -> None:
    """Raises `UserError` for a changed configuration unless `force`, and for a directory that is not a run.

    The mesh and the division of a step's rows into micro-batches may change.
    """
    path = directory / CONFIG_FILE
    if path.is_file():
        before, data_is_known = load_run_config(path), (directory / DATA_FILE).is_file()
        changed = difference(_comparable(before, data_is_known), _comparable(config, data_is_known))
        _refuse_or_announce(directory, "another configuration", changed, force)
    elif directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir={directory} is not a directory")
    elif (directory / "metrics.jsonl").exists() or (directory / "checkpoints").exists():
        raise UserError(f"{directory}: holds results but no {CONFIG_FILE}; choose another output_dir")


def check_data(directory: Path, found: Mapping[str, Any], force: bool) -> None:
    """Raises `UserError` if the rows differ from those with which the run began, unless `force`."""
    path = directory / DATA_FILE
    if not path.is_file():
        return
    before = read_json(path)
    changed = [
        f"{phase}: {_rows(before[phase])} -> {_rows(found[phase])}"
        for phase in found
        if phase in before and before[phase] != found[phase]
    ]
    _refuse_or_announce(directory, "other data", changed, force)


def write_identity(directory: Path, config: ConfigDict, data: Mapping[str, Any]) -> None:
    """Writes the files that `check_config` and `check_data` compare with, each atomically."""
    (directory / DATA_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_whole(directory / DATA_FILE, json.dumps(data, indent=2, sort_keys=True) + "\n")
    write_whole(directory / CONFIG_FILE, to_json(config))


def describe_rows(rows: Mapping[str, tuple[datasets.Dataset, datasets.Dataset]]) -> dict[str, Any]:
    """Returns what identifies the (training rows, test rows) of each phase. Process 0 reads them for all processes.

    Raises `UserError` in all processes if one has another number of rows than process 0.
    """
    told = told_by_one_process(lambda: {phase: describe_data(*both) for phase, both in rows.items()}, "data")
    here = {phase: [len(part) for part in both] for phase, both in rows.items()}
    same = here == {phase: [found["train_rows"], found["test_rows"]] for phase, found in told.items()}
    if not agreed(same):
        raise UserError("dataset: the processes do not have the same rows: every one must see the same files")
    return told


def describe_data(train_rows: datasets.Dataset, test_rows: datasets.Dataset) -> dict[str, Any]:
    """Returns what identifies the rows of a phase: their number, and a digest of all tokens and answers in order."""
    digest = hashlib.blake2b(digest_size=16)
    for rows in (train_rows, test_rows):
        digest.update(f"{len(rows)}".encode())
        for table in tables(rows, ["tokens", "answer_mask"]):
            for column in ("tokens", "answer_mask"):
                lists = table[column].combine_chunks()
                digest.update(lists.value_lengths().to_numpy().tobytes())
                digest.update(lists.flatten().cast(pa.int32()).to_numpy().tobytes())
    return {"train_rows": len(train_rows), "test_rows": len(test_rows), "digest": digest.hexdigest()}


def _comparable(config: ConfigDict, data_is_known: bool) -> ConfigDict:
    """Returns `config` without what may change: free keys, the division into micro-batches, the spelling of paths.

    Names of data sets are ignored if their contents are compared (`check_data`).
    """
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        for key in ("model", "adapter"):
            if plain[key] and (path := Path(plain[key]).expanduser()).exists():
                plain[key] = str(path.resolve())
        if data_is_known:
            del plain["dataset"]
            for phase in PHASES:
                del plain[phase]["dataset"]
        rows = {phase: plain[phase].batch_size or plain.batch_size for phase in plain.phases}
        plain.rows_of_a_step = {phase: size * plain.gradient_accumulation_steps for phase, size in rows.items()}
        for key in ("batch_size", "gradient_accumulation_steps", *(f"{phase}.batch_size" for phase in rows)):
            section, _, leaf = key.rpartition(".")
            del (plain[section] if section else plain)[leaf]
        for key in _FREE:
            section, dot, leaf = key.partition(".")
            if (dot and not leaf) or section in plain:
                del plain[section]
    return plain


def _refuse_or_announce(directory: Path, what: str, changed: list[str], force: bool) -> None:
    if not changed:
        return
    if not force:
        raise UserError(
            f"{directory} holds a run with {what} ({'; '.join(changed)}): choose another output_dir, or the same to "
            f"resume it, or {FORCE} to go on from its checkpoint all the same"
        )
    print(f"{FORCE}: {directory} resumes with {what} ({'; '.join(changed)})", flush=True)


def _rows(data: Mapping[str, Any]) -> str:
    return f"{data.get('train_rows')}+{data.get('test_rows')} rows ({str(data.get('digest'))[:8]})"
