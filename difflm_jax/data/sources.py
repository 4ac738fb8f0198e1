"""Opens data sets: local files and folders, built-in ones, or those of the hub. Rows are streamed."""

import functools
import hashlib
import importlib.resources
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from difflm_jax.data.fingerprint import file_hash
from difflm_jax.data.readers import READERS, ending, endings, read_file
from difflm_jax.data.rows import Row, RowError, Source
from difflm_jax.data.splits import METADATA_FILES, Files, Part, files_by_split, parse_splits
from difflm_jax.data.tables import BATCH_ROWS, table_rows
from difflm_jax.errors import UserError, one_line

__all__ = ["Row", "RowError", "Source", "open_source"]

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_UNREAD_ENDINGS = (".xlsx", ".gz", ".zst", ".zip", ".arrow")
_LOCAL_ALTERNATIVES = "a local .jsonl, .json, .parquet, .csv or .txt file, a directory of these, or builtin:NAME"

_Rows = Callable[[], Iterator[Row]]


def open_source(dataset: str) -> Source:
    """Opens the data set that `dataset` names: a file, a directory, 'builtin:NAME', or a hub id.

    A name may end in a configuration and a split, 'NAME:CONFIG@SPLIT', with the split syntax of `datasets` ('test',
    'train[:10%]', 'train+test'). The default split is 'train'. Raises `UserError` if the data set is missing or
    unreadable.
    """
    if not dataset:
        raise UserError(f"dataset: is empty; give {_LOCAL_ALTERNATIVES}, or a hub id")
    if dataset.startswith("builtin:"):
        return _files_source(dataset, {"train": [(dataset, _builtin_file(dataset.removeprefix("builtin:")))]}, [])
    if (found := _open_local(dataset, dataset, "")) is not None:
        return found
    name, at, splits = dataset.rpartition("@")
    if at and (found := _open_local(dataset, name, splits)) is not None:
        return found
    name, splits = (name, splits) if at else (dataset, "train")
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None or _looks_like_path(name):
        raise UserError(f"{name}: no such file or directory")
    parse_splits(splits, dataset)
    return _hub_source(dataset, hub_id["id"], hub_id["config"], splits)


def _open_local(dataset: str, name: str, splits: str) -> Source | None:
    """Opens `name` on this machine; None if it does not exist. `splits` is the text of the requested splits."""
    path = Path(name).expanduser()
    parts = parse_splits(splits, dataset) if splits else [Part("train")]
    if path.is_file():
        if ending(path) is None:
            raise UserError(f"{name}: files that end in {path.suffix or 'nothing'} are not read; give {endings()}")
        return _files_source(dataset, {"train": [(name, path)]}, parts)
    if path.is_dir():
        return _folder_source(dataset, name, path, None, parts)
    folder, _, config = name.rpartition(":")
    if re.fullmatch(r"[\w.-]+", config) and folder and Path(folder).expanduser().is_dir():
        return _folder_source(dataset, folder, Path(folder).expanduser(), config, parts)
    return None


def _looks_like_path(name: str) -> bool:
    """Whether a name that does not exist looks more like a path than like a hub id."""
    path = Path(name)
    return (
        name.startswith((".", "/", "~"))
        or path.suffix.lower() in (*READERS, *_UNREAD_ENDINGS)
        or (len(path.parts) > 1 and path.parent.is_dir())
    )


def _builtin_file(name: str) -> Path:
    folder = importlib.resources.files("difflm_jax.data") / "builtin"
    known = sorted(f.name.removesuffix(".jsonl") for f in folder.iterdir() if f.name.endswith(".jsonl"))
    if name not in known:
        raise UserError(f"builtin:{name}: no such built-in data set; known: {', '.join(known) or 'none'}")
    return Path(str(folder / f"{name}.jsonl"))


def _folder_source(dataset: str, name: str, folder: Path, config: str | None, parts: list[Part]) -> Source:
    """Opens a folder of data files, or one that `save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_source(dataset, name, folder, parts)
    files = files_by_split(name, folder, config)
    if not files:
        raise UserError(f"{name}: the directory holds no file that ends in {endings()}")
    named = {split: [(str(Path(name) / path), folder / path) for path in paths] for split, paths in files.items()}
    source = _files_source(dataset, named, parts)
    _announce(name, folder, files, parts)
    return source


def _announce(name: str, folder: Path, files: Files, parts: list[Part]) -> None:
    """Prints which split is read, and which entries of the folder belong to no split."""
    if len(files) > 1:
        counts = ", ".join(f"{split} ({len(paths)} file{'s' * (len(paths) > 1)})" for split, paths in files.items())
        print(f"data: {name}: reads the split {'+'.join(part.split for part in parts)} of {counts}", flush=True)
    used = {path.parts[0] for paths in files.values() for path in paths}
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    others = [entry for entry in entries if entry not in used and entry not in METADATA_FILES - {"README.md"}]
    if others:
        print(f"data: {name}: not read: {', '.join(others[:10])}{' …' if len(others) > 10 else ''}", flush=True)


def _files_source(name: str, files: dict[str, list[tuple[str, Path]]], parts: list[Part]) -> Source:
    """Opens the files of `parts`, or of all splits if `parts` is empty."""
    splits = {split: functools.partial(_rows_of_files, paths) for split, paths in files.items()}
    parts = parts or [Part(split) for split in splits]
    rows = _rows_of_parts(name, splits, parts)
    digest = hashlib.blake2b(digest_size=16)
    for split in dict.fromkeys(part.split for part in parts):
        for file_name, path in files[split]:
            digest.update(file_name.encode("utf-8", "surrogateescape") + b"\0")
            try:
                digest.update(file_hash(path).encode())
            except OSError as error:
                raise UserError(f"{file_name}: cannot be read ({one_line(error)})") from error
    return Source(name, digest.hexdigest(), rows)


def _rows_of_files(files: Iterable[tuple[str, Path]]) -> Iterator[Row]:
    for file_name, path in files:
        yield from read_file(file_name, path)


def _rows_of_parts(name: str, splits: dict[str, _Rows], parts: list[Part]) -> _Rows:
    """Chains the rows of several parts. Raises `UserError` for a split that does not exist."""
    for part in parts:
        if part.split not in splits:
            source = name.rpartition("@")[0] or name
            raise UserError(
                f"{name}: has no split {part.split!r}; there is {', '.join(splits)} "
                f"(name it as {source}@{next(iter(splits))})"
            )

    def rows() -> Iterator[Row]:
        for part in parts:
            whole = splits[part.split]
            first, last = part.bounds(functools.partial(_count, whole))
            yield from itertools.islice(whole(), first, last)

    return rows


def _count(rows: _Rows) -> int:
    return sum(1 for _ in rows())


def _saved_source(dataset: str, name: str, folder: Path, parts: list[Part]) -> Source:
    """Opens a `Dataset` or `DatasetDict` that `save_to_disk` wrote."""
    import datasets  # a second of every start of `generate`, which reads no rows

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises errors of any type
        raise UserError(
            f"{name}: `datasets` saved this folder, and cannot load it ({one_line(error)[:300]})"
        ) from error
    tables = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    splits = {split: functools.partial(_rows_of_table, name, table) for split, table in tables.items()}
    rows = _rows_of_parts(dataset, splits, parts)
    return Source(dataset, f"{dataset} {' '.join(tables[part.split]._fingerprint for part in parts)}", rows)


def _rows_of_table(name: str, table: Any) -> Iterator[Row]:
    return table_rows(name, table.with_format("arrow").iter(batch_size=BATCH_ROWS))


def _hub_source(dataset: str, hub_id: str, config: str | None, split: str) -> Source:
    print(f"data: {dataset}: no local file or directory of this name, looking on the hub", flush=True)
    import datasets  # a second of every start of `generate`, which reads no rows

    try:
        table = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the hub client and dataset builders raise errors of any type
        raise UserError(
            f"{dataset}: there is no local file or directory of this name, and as a data set of the hub it cannot be "
            f"fetched ({one_line(error)[:300]}); give {_LOCAL_ALTERNATIVES}"
        ) from error
    return Source(dataset, f"{dataset} {table._fingerprint}", functools.partial(_rows_of_table, dataset, table))
