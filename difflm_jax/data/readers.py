"""Reads files of rows by extension: .jsonl, .json, .parquet, .txt, .csv, .tsv; the text ones also as .gz and .zst.

Rows are streamed. A bad line is an error of its row only.
"""

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from difflm_jax.data.rows import Row, RowError
from difflm_jax.data.tables import read_parquet
from difflm_jax.errors import UserError, one_line

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_TEXT_PIECE_BYTES = 1 << 16
_DOCUMENT_END = b"<|endoftext|>"

csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is too small for documents


def read_file(name: str, path: Path) -> Iterator[Row]:
    """Yields the rows of a file, called `name` in errors and origins. Raises `UserError` if it cannot be read."""
    try:
        yield from READERS[ending(path)](name, path)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({one_line(error)})") from error


def ending(path: Path) -> str | None:
    """The extension that determines how `path` is read, ignoring a compression suffix; None if it is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in _COMPRESSION and suffixes[0] != ".parquet":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def endings() -> str:
    """The supported extensions, as text."""
    return ", ".join(READERS)


def _open(path: Path) -> IO[bytes]:
    kind = _COMPRESSION.get(path.suffix.lower())
    if kind is None:
        return path.open("rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=kind), buffer_size=1 << 20)


def _read_jsonl(name: str, path: Path) -> Iterator[Row]:
    with _open(path) as file:
        yield from _json_lines(name, file)


def _json_lines(name: str, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield Row(f"{name}:{number}", functools.partial(_parse_json, line, is_first=number == 1))


def _parse_json(line: bytes, is_first: bool) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # plain ValueError: a number with thousands of digits
        raise RowError(f"not JSON ({one_line(error)})") from error


def _read_json(name: str, path: Path) -> Iterator[Row]:
    """Yields the elements of a JSON list, or one object per line; `datasets` reads both too.

    The text of a list is kept in memory; its parsed elements are not.
    """
    with _open(path) as file:
        content = file.read()
    if _is_json_lines(content):
        yield from _json_lines(name, io.BytesIO(content))
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from error
    del content
    yield from _json_list(name, text)


def _is_json_lines(content: bytes) -> bool:
    """Whether the first non-blank line is a complete JSON object."""
    first = next((line for line in io.BytesIO(content) if line.strip()), b"").decode("utf-8-sig", "replace").strip()
    if not first.startswith("{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_list(name: str, text: str) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    skip = re.compile(r"[ \t\r\n]*").match
    position = skip(text).end()
    if text[position : position + 1] != "[":
        raise UserError(f"{name}: is neither a JSON list of rows nor one JSON object per line")
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


def _read_csv(name: str, path: Path, delimiter: str = ",") -> Iterator[Row]:
    """Yields rows of strings, keyed by the names in the first line."""
    reader = None
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
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


def _read_txt(name: str, path: Path) -> Iterator[Row]:
    """Yields the text of one document, or of several separated by lines of `<|endoftext|>`.

    Documents are yielded in pieces of about 64 thousand bytes, each ending at the end of a line.
    """
    piece: list[bytes] = []
    size, start, continued = 0, 1, False

    def row(continues: bool) -> Row:
        load = functools.partial(_parse_text, b"".join(piece), start)
        return Row(f"{name}:{start}", load, continues, continued)

    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            is_end = line.strip() == _DOCUMENT_END
            if size and (is_end or size >= _TEXT_PIECE_BYTES):
                yield row(continues=not is_end)
                piece, size, continued = [], 0, not is_end
            if not is_end and (size or line.strip()):  # a piece must not begin with empty lines
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


READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": read_parquet,
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
}
