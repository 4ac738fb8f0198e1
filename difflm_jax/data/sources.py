"""Where rows come from: local files, a directory of them, the built-in sets, or the hub. Rows are streamed."""

import csv
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from difflm_jax.errors import UserError, one_line

_BATCH_ROWS = 1000
_TEXT_PIECE_BYTES = 1 << 16
_DOCUMENT_END = b"<|endoftext|>"
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
_UNREAD_ENDINGS = (".tsv", ".gz", ".zst", ".zip", ".arrow")
_LOCAL_ALTERNATIVES = "a local .jsonl, .json, .parquet, .csv or .txt file, a directory of these, or builtin:NAME"

csv.field_size_limit(2**31 - 1)  # its own limit, 131,072 characters, is less than a document


class RowError(UserError):
    """What is wrong with one row; whoever knows the row's origin adds it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that is not parsed yet: `load()` gives its value or raises `RowError`.

    `origin` is 'file:line', 'file[index]' or 'hubid[index]'. `continues` says that the text of this row goes on in the
    next one, so that no document ends here.
    """

    origin: str
    load: Callable[[], Any]
    continues: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that has been found: `rows()` streams it from the start; `fingerprint` changes with its contents."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[Row]]


def open_source(dataset: str) -> Source:
    """Finds the data set that `dataset` names: a file, a directory, 'builtin:NAME', or a hub id.

    A hub id may name a configuration and a split, 'id:config@split'; the split is 'train' without it. Raises
    `UserError` for what is not there or not readable.
    """
    if not dataset:
        raise UserError(f"dataset: is empty; give {_LOCAL_ALTERNATIVES}, or a hub id")
    if dataset.startswith("builtin:"):
        return _files_source(dataset, [(dataset, _builtin_file(dataset.removeprefix("builtin:")))])
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _files_source(dataset, _files_of_directory(dataset, path))
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise UserError(f"{dataset}: files that end in {path.suffix or 'nothing'} are not read; give {_endings()}")
        return _files_source(dataset, [(dataset, path)])
    hub_id = _HUB_ID.fullmatch(dataset)
    if hub_id is None or _looks_like_path(dataset):
        raise UserError(f"{dataset}: no such file or directory")
    return _hub_source(dataset, hub_id["id"], hub_id["config"], hub_id["split"] or "train")


def _looks_like_path(dataset: str) -> bool:
    """Whether a name that is no file was more likely meant as one than as a hub id."""
    path = Path(dataset)
    return (
        dataset.startswith((".", "/", "~"))
        or path.suffix.lower() in (*_READERS, *_UNREAD_ENDINGS)
        or (len(path.parts) > 1 and path.parent.is_dir())
    )


def _builtin_file(name: str) -> Path:
    folder = importlib.resources.files("difflm_jax.data") / "builtin"
    known = sorted(f.name.removesuffix(".jsonl") for f in folder.iterdir() if f.name.endswith(".jsonl"))
    if name not in known:
        raise UserError(f"builtin:{name}: no such built-in data set; known: {', '.join(known) or 'none'}")
    return Path(str(folder / f"{name}.jsonl"))


def _endings() -> str:
    return ", ".join(_READERS)


def _files_of_directory(dataset: str, folder: Path) -> list[tuple[str, Path]]:
    """(name, path) of the data files right in `folder`, sorted; announces what else lies there."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in _READERS]
    if not files:
        raise UserError(f"{dataset}: the directory holds no file that ends in {_endings()}")
    if others := [entry.name for entry in entries if entry not in files]:
        print(f"data: {dataset}: not read: {', '.join(others[:10])}{' …' if len(others) > 10 else ''}", flush=True)
    return [(str(Path(dataset) / file.name), file) for file in files]


def _files_source(name: str, files: list[tuple[str, Path]]) -> Source:
    digest = hashlib.blake2b(digest_size=16)
    for file_name, path in files:
        digest.update(file_name.encode("utf-8", "surrogateescape") + b"\0")
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise UserError(f"{file_name}: cannot be read ({one_line(error)})") from error

    def rows() -> Iterator[Row]:
        for file_name, path in files:
            yield from _READERS[path.suffix.lower()](file_name, path)

    return Source(name, digest.hexdigest(), rows)


def _hub_source(dataset: str, hub_id: str, config: str | None, split: str) -> Source:
    print(f"data: {dataset}: no local file or directory of this name, looking on the hub", flush=True)
    import datasets  # a second of every start of `generate`, which reads no rows

    try:
        table = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # anything at all comes out of the hub's and the builders' code
        raise UserError(
            f"{dataset}: there is no local file or directory of this name, and as a data set of the hub it cannot be "
            f"fetched ({one_line(error)[:300]}); give {_LOCAL_ALTERNATIVES}"
        ) from error
    batches = functools.partial(table.with_format("arrow").iter, batch_size=_BATCH_ROWS)
    return Source(dataset, f"{dataset} {table._fingerprint}", lambda: _table_rows(dataset, batches()))


def _read_jsonl(name: str, path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{name}:{number}", functools.partial(_parse_json, line, is_first=number == 1))


def _parse_json(line: bytes, is_first: bool) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # ValueError itself: a number of thousands of digits
        raise RowError(f"not JSON ({one_line(error)})") from error


def _read_json(name: str, path: Path) -> Iterator[Row]:
    """The elements of a JSON list. The file's text is held in memory, its parsed elements are not."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from error
    decoder = json.JSONDecoder()
    skip = re.compile(r"[ \t\r\n]*").match
    position = skip(text).end()
    if text[position : position + 1] != "[":
        raise UserError(f"{name}: is not a JSON list of rows; a file with one object a line must end in .jsonl")
    position = skip(text, position + 1).end()
    index = 0
    while text[position : position + 1] != "]":
        try:
            value, position = decoder.raw_decode(text, position)
            position = skip(text, position).end()
            if text[position : position + 1] == ",":
                position = skip(text, position + 1).end()
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}[{index}]: the file is not JSON from here on ({one_line(error)})") from error
        yield Row(f"{name}[{index}]", functools.partial(_identity, value))
        index += 1


def _identity(value: Any) -> Any:
    return value


def _read_csv(name: str, path: Path) -> Iterator[Row]:
    """Rows of texts under the names of the first line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                yield Row(f"{name}:{reader.line_num}", functools.partial(_csv_row, row, len(reader.fieldnames)))
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: not CSV ({one_line(error)})") from error


def _csv_row(row: dict[str | None, Any], columns: int) -> dict[str, str]:
    if None in row or None in row.values():
        raise RowError(f"does not have {columns} columns, as the first line")
    return row


def _read_parquet(name: str, path: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _table_rows(name, file.iter_batches(batch_size=_BATCH_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: is not a readable parquet file ({one_line(error)})") from error


def _table_rows(name: str, batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Row]:
    index = 0
    for batch in batches:
        for i in range(batch.num_rows):
            yield Row(f"{name}[{index}]", functools.partial(_table_row, batch, i))
            index += 1


def _table_row(batch: pa.RecordBatch | pa.Table, i: int) -> dict[str, Any]:
    try:
        return _without_added_nulls(batch.slice(i, 1).to_pylist()[0])
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason} at byte {error.start})") from error


def _without_added_nulls(value: Any, free_form: bool = False) -> Any:
    """Without nulls in arguments and tools: a column has the fields of all its rows, and null where a row has none."""
    if isinstance(value, list):
        return [_without_added_nulls(each, free_form) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_added_nulls(each, free_form or key in ("arguments", "tools"))
        for key, each in value.items()
        if each is not None or not free_form
    }


def _read_txt(name: str, path: Path) -> Iterator[Row]:
    """A text file is one document, or several that lines of `<|endoftext|>` part.

    Documents are given in pieces of some 64 thousand bytes that end where a line does.
    """
    piece: list[bytes] = []
    size, start = 0, 1

    def row(continues: bool) -> Row:
        return Row(f"{name}:{start}", functools.partial(_parse_text, b"".join(piece), start), continues)

    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            is_end = line.strip() == _DOCUMENT_END
            if size and (is_end or size >= _TEXT_PIECE_BYTES):
                yield row(continues=not is_end)
                piece, size = [], 0
            if not is_end and (size or line.strip()):  # no piece begins with empty lines
                start = start if size else number
                piece.append(line)
                size += len(line)
    if size:
        yield row(continues=False)


def _parse_text(piece: bytes, first_line: int) -> dict[str, str]:
    try:
        return {"text": piece.decode("utf-8").removeprefix("\ufeff")}
    except UnicodeDecodeError as error:
        line = first_line + piece.count(b"\n", 0, error.start)
        raise RowError(f"not UTF-8 ({error.reason} in line {line})") from error


_READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    ".csv": _read_csv,
}
