"""Caches a data set as tokens on disk: written once per set of options, found again by its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from difflm_jax.data.examples import Example, Options, Report, examples
from difflm_jax.data.sources import Source, open_source
from difflm_jax.errors import UserError, one_line
from difflm_jax.utils.files import synced, write_whole
from difflm_jax.utils.locks import locked
from difflm_jax.utils.progress import Progress

if TYPE_CHECKING:
    import datasets

_FORMAT_VERSION = 5  # increase it when the stored format changes, or the way rows become tokens
_ROWS_FILE, _SUMMARY_FILE = "rows.arrow", "summary.json"
_SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),
        "answer_mask": pa.list_(pa.bool_()),
        "length": pa.int32(),
        "prompt_length": pa.int32(),
        "final_answer_length": pa.int32(),
        "content_hash": pa.int64(),
        "origin": pa.string(),
    }
)


def tokenize(
    dataset: str, tokenizer: PreTrainedTokenizerBase, options: Options, cache_dir: str | Path | None = None
) -> datasets.Dataset:
    """Returns the rows of `dataset` as tokens, memory-mapped from the cache. The first call writes the cache.

    dataset: see `difflm_jax.data.sources.open_source`. cache_dir: the default is the cache of `datasets`.

    Columns: tokens (list of int32, at most `max_length`), answer_mask (list of bool), length, prompt_length and
    final_answer_length (int32, see `record_batch`), content_hash (int64, of the messages or text before tokenisation),
    origin (str, 'file:line', 'file[index]' or 'hubid[index]').

    Raises `UserError` for a missing source, too many bad rows, no usable row, and a row that contains the token
    `options.mask_token_id`.
    """
    if not options.debug:  # the seed then has no effect, so it must not cause a second copy
        options = dataclasses.replace(options, seed=0)
    source = open_source(dataset)
    folder = _cache_folder(cache_dir)
    stored = folder / _fingerprint(source, tokenizer, options)
    if (rows := _read(stored)) is None:
        with locked(stored.with_suffix(".lock")):  # one process tokenises, the others wait
            if (rows := _read(stored, remove_damaged=True)) is None:
                print(f"{_make(source, tokenizer, options, stored)}; kept in {stored} ({options.phase})", flush=True)
                return _read(stored)
    summary = json.loads((stored / _SUMMARY_FILE).read_text())["summary"]
    print(f"{summary}; reused from {stored} ({options.phase})", flush=True)
    return rows


def _read(stored: Path, remove_damaged: bool = False) -> datasets.Dataset | None:
    """Reads the rows in the folder `stored`; None if it is missing or damaged. `remove_damaged` requires the lock."""
    if not stored.is_dir():
        return None
    import datasets

    try:
        about = json.loads((stored / _SUMMARY_FILE).read_text())
        size = (stored / _ROWS_FILE).stat().st_size
        if size != about["bytes"]:
            raise ValueError(f"{_ROWS_FILE} has {size} bytes of {about['bytes']}")
        rows = datasets.Dataset.from_file(str(stored / _ROWS_FILE))
        if len(rows) != about["rows"]:
            raise ValueError(f"{_ROWS_FILE} has {len(rows)} rows of {about['rows']}")
    except Exception as error:  # pyarrow raises errors of any type for an unreadable file
        if remove_damaged:
            print(f"data: {stored}: is damaged ({one_line(error)[:200]}) and made again", flush=True)
            shutil.rmtree(stored, ignore_errors=True)
        return None
    return rows


def _cache_folder(cache_dir: str | Path | None) -> Path:
    import datasets

    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "difflm_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the cache of tokenised data cannot be made there ({one_line(error)})") from error
    return folder


def _fingerprint(source: Source, tokenizer: PreTrainedTokenizerBase, options: Options) -> str:
    """A hash of the rows, the tokenizer, its template, the options, and the format version."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:  # skip the truncation and padding before the tokens: they are left from an earlier call
        vocabulary = backend.to_str().partition('"added_tokens":')[2]
    parts = [
        _FORMAT_VERSION,
        source.name,
        source.fingerprint,
        vocabulary,
        tokenizer.chat_template,
        [str(tokenizer.bos_token), str(tokenizer.eos_token)],
        dataclasses.asdict(options),
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _make(source: Source, tokenizer: PreTrainedTokenizerBase, options: Options, stored: Path) -> str:
    """Writes the folder `stored` atomically and returns a summary of its contents."""
    report = Report(source.name)
    try:
        with tempfile.TemporaryDirectory(dir=stored.parent, prefix=f"{stored.name}.") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            chunks = _shown(examples(source, tokenizer, options, report), source.name)
            rows = _write_rows(made / _ROWS_FILE, chunks)
            report.check(options.bad_row_budget)
            about = {"summary": report.summary(), "rows": rows, "bytes": (made / _ROWS_FILE).stat().st_size}
            write_whole(made / _SUMMARY_FILE, json.dumps(about))
            synced(made / _ROWS_FILE)
            try:
                made.rename(stored)
            except OSError:
                if not stored.is_dir():  # otherwise another process has written the same meanwhile
                    raise
            synced(stored.parent)
    except OSError as error:
        raise UserError(
            f"{stored.parent}: tokenised rows cannot be written there ({one_line(error)[:200]}); name another folder "
            "with cache_dir"
        ) from error
    return report.summary()


def _write_rows(path: Path, chunks: Iterable[list[Example]]) -> int:
    """Writes examples to an Arrow file and returns how many there are."""
    rows = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for chunk in filter(None, chunks):
            writer.write_batch(record_batch(chunk))
            rows += len(chunk)
    return rows


def _shown(chunks: Iterator[list[Example]], name: str) -> Iterator[list[Example]]:
    """Yields `chunks` and shows progress."""
    with Progress(f"tokenising {name}", "examples") as progress:
        while (chunk := _next(chunks, name)) is not None:
            yield chunk
            progress.advance(len(chunk))


def _next(chunks: Iterator[list[Example]], name: str) -> list[Example] | None:
    """The next chunk. An `OSError` here is one of reading the source, not of writing the cache."""
    try:
        return next(chunks, None)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({one_line(error)[:200]})") from error


def stored_rows(made: list[Example]) -> datasets.Dataset:
    """Returns examples in memory in the form that `tokenize` returns from disk."""
    import datasets

    return datasets.Dataset(pa.Table.from_batches([record_batch(made)]))


def record_batch(chunk: list[Example]) -> pa.RecordBatch:
    """Returns examples in the stored format, with the columns that plans and batches need.

    length: tokens of the example. prompt_length: index of the first token of an answer, `length` if there is none.
    final_answer_length: tokens of the answer that ends the example, 0 if its last token is in no answer.
    """
    encoded = [example.encoded for example in chunk]
    offsets = np.cumsum([0] + [len(each.tokens) for each in encoded]).astype(np.int32)
    tokens = np.concatenate([each.tokens for each in encoded] or [np.zeros(0, np.int32)])
    answer_mask = np.concatenate([each.answer_mask for each in encoded] or [np.zeros(0, bool)])
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(tokens)),
        pa.ListArray.from_arrays(offsets, pa.array(answer_mask)),
        pa.array(np.diff(offsets)),
        pa.array([each.prompt_length for each in encoded], pa.int32()),
        pa.array([_final_answer_length(each.answer_mask) for each in encoded], pa.int32()),
        pa.array([example.content_hash for example in chunk], pa.int64()),
        pa.array([example.origin for example in chunk], pa.string()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def check_ids(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> None:
    """Raises `UserError` for a token of `rows`, or an end-of-sequence token, that the embedding has no row for."""
    largest = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in rows.data.column("tokens").chunks), default=0)
    if (found := max(largest, tokenizer.eos_token_id or 0)) >= embedding_rows:
        raise UserError(
            f"the tokenizer's {tokenizer.convert_ids_to_tokens(found)!r} has id {found}, but the model's embedding has "
            f"{embedding_rows} rows: this tokenizer does not belong to it, or its embedding has to be resized first "
            "(resize_token_embeddings of transformers)"
        )


def _final_answer_length(answer_mask: np.ndarray) -> int:
    backwards = answer_mask[::-1]
    return len(backwards) if backwards.all() else int(backwards.argmin())
