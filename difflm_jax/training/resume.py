"""Whether a run directory can be gone on with: the same configuration, the same data, or what was changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ml_collections import ConfigDict

from difflm_jax.checkpoint.safetensors import read_json
from difflm_jax.config.files import difference, load_run_config, to_json
from difflm_jax.errors import UserError
from difflm_jax.utils.dtypes import AUTO, fastest_dtype
from difflm_jax.utils.files import write_whole

if TYPE_CHECKING:
    import datasets

CONFIG_FILE, DATA_FILE = "config.json", "checkpoints/data.json"
FORCE = "--force"

# Keys that change where and how fast a run goes, and what is seen of it, but no number that it trains with.
_FREE = (
    "mesh.", "cache_dir", "dataloader_num_workers", "pin_memory", "keep_checkpoints", "heartbeat_seconds", "profile.",
    "wandb_config.", "log_interval", "report.", "remat", "attention_kernel", "loss_chunk", "max_nonfinite_steps",
    "unroll_layers",
)  # fmt: skip
_READ_ROWS = 10_000


def settle_dtype(config: ConfigDict) -> ConfigDict:
    """`config` with a dtype in place of "auto": that of the run which it resumes, else the machine's fastest."""
    if config.dtype != AUTO:
        return config
    begun = Path(config.output_dir) / CONFIG_FILE
    settled = config.copy_and_resolve_references()
    with settled.unlocked():
        settled.dtype = load_run_config(begun).dtype if begun.is_file() else fastest_dtype()
    print(f"dtype: {settled.dtype}")
    return settled.lock()


def check_config(directory: Path, config: ConfigDict, force: bool) -> None:
    """Refuses to go on with another configuration unless `force`, and to write into a directory that is no run.

    Another mesh, and another division of the rows of a step into micro-batches, is not another configuration.
    """
    path = directory / CONFIG_FILE
    if path.is_file():
        before = load_run_config(path)
        changed = difference(_comparable(before), _comparable(config))
        _refuse_or_announce(directory, "another configuration", changed, force)
    elif directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir={directory} is not a directory")
    elif (directory / "metrics.jsonl").exists() or (directory / "checkpoints").exists():
        raise UserError(f"{directory}: holds results but no {CONFIG_FILE}; choose another output_dir")


def check_data(directory: Path, found: Mapping[str, Any], force: bool) -> None:
    """Refuses to go on with other rows than those that the run began with, unless `force`."""
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
    """Writes what `check_config` and `check_data` compare with, each file whole."""
    (directory / DATA_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_whole(directory / DATA_FILE, json.dumps(data, indent=2, sort_keys=True) + "\n")
    write_whole(directory / CONFIG_FILE, to_json(config))


def describe_data(train_rows: datasets.Dataset, test_rows: datasets.Dataset) -> dict[str, Any]:
    """What identifies the rows of a phase: their number, and a digest of all tokens and answers in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for rows in (train_rows, test_rows):
        digest.update(f"{len(rows)}".encode())
        for table in rows.with_format("arrow").iter(batch_size=_READ_ROWS) if len(rows) else ():
            for column in ("tokens", "answer_mask"):
                lists = table[column].combine_chunks()
                digest.update(lists.value_lengths().to_numpy().tobytes())
                digest.update(lists.flatten().cast(pa.int32()).to_numpy().tobytes())
    return {"train_rows": len(train_rows), "test_rows": len(test_rows), "digest": digest.hexdigest()}


def _comparable(config: ConfigDict) -> ConfigDict:
    """`config` without what may change: free keys, and how the rows of a step divide into micro-batches."""
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
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
    print(f"{FORCE}: {directory} goes on with {what} ({'; '.join(changed)})", flush=True)


def _rows(data: Mapping[str, Any]) -> str:
    return f"{data.get('train_rows')}+{data.get('test_rows')} rows ({str(data.get('digest'))[:8]})"
