"""A data set as tokens on disk: made once for a set of options, found again by its fingerprint."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from difflm_jax.data.chat import (
    ANSWERS,
    OVERLONG,
    Encoded,
    Rendered,
    cut,
    encode_rendered,
    encode_texts,
    render_answers,
    render_whole,
    windows,
)
from difflm_jax.data.formats import Conversation, parse_row
from difflm_jax.data.sources import Row, RowError, Source, open_source
from difflm_jax.errors import UserError, one_line

PHASES = ("pretrain", "sft")
DEBUG_EXAMPLES = 100

_FORMAT_VERSION = 1  # of the stored rows and of what they are made from: a change of either needs a new number
_CHUNK_ROWS = 256
_SHOWN_BAD_ROWS = 5
_PROGRESS_ROWS = 100_000
_SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),
        "answer_mask": pa.list_(pa.bool_()),
        "content_hash": pa.int64(),
        "origin": pa.string(),
    }
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What, beside the rows and the tokenizer, decides the tokens; `tokenize` explains each."""

    phase: str
    max_length: int
    answers: str
    overlong: str
    bad_row_budget: float
    mask_token_id: int | None
    debug: bool
    seed: int | None

    def __post_init__(self) -> None:
        for key, known in (("phase", PHASES), ("answers", ANSWERS), ("overlong", OVERLONG)):
            if getattr(self, key) not in known:
                raise UserError(f"{key}={getattr(self, key)!r}: must be one of {', '.join(known)}")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length}: must be at least 2")
        if not 0 <= self.bad_row_budget <= 1:
            raise UserError(f"bad_row_budget={self.bad_row_budget}: is a share of the rows, between 0 and 1")


@dataclasses.dataclass
class Report:
    """What became of the rows."""

    rows: int = 0
    examples: int = 0
    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    cut: int = 0
    dropped: int = 0
    bad: int = 0
    bad_rows: list[str] = dataclasses.field(default_factory=list)  # the first few

    def add_bad(self, origin: str, error: RowError) -> None:
        self.bad += 1
        if len(self.bad_rows) < _SHOWN_BAD_ROWS:
            self.bad_rows.append(f"{origin}: {error}")

    def bad_summary(self) -> str:
        more = f"; and {self.bad - len(self.bad_rows)} more" if self.bad > len(self.bad_rows) else ""
        return (
            f"{self.bad} of {self.rows} rows {'is' if self.bad == 1 else 'are'} bad: {'; '.join(self.bad_rows)}{more}"
        )

    def summary(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.most_common())
        parts = [f"{self.examples} examples from {self.rows} rows ({formats})"]
        parts += [f"{self.cut} cut to max_length"] * bool(self.cut)
        parts += [f"{self.dropped} longer than max_length dropped"] * bool(self.dropped)
        parts += [self.bad_summary()] * bool(self.bad)
        return "; ".join(parts)


def tokenize(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    phase: str,
    max_length: int,
    answers: str = "last",
    overlong: str = "cut",
    bad_row_budget: float = 0.01,
    mask_token_id: int | None = None,
    debug: bool = False,
    seed: int = 42,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """The rows of `dataset` as tokens, memory-mapped from the cache, where the first call puts them.

    dataset: see `difflm_jax.data.sources.open_source`. phase: "sft" wants conversations with an answer; "pretrain"
    takes plain text too (cut into windows of `max_length`) and conversations without one. answers: which assistant
    turns are marked, "last" or "all". overlong: "cut" (`difflm_jax.data.chat.cut`) or "drop". bad_row_budget: the
    share of bad rows that is left out and announced; more is an error. debug: 100 examples, chosen by `seed`.
    cache_dir: default is the cache of `datasets`.

    Columns: tokens (list of int32, at most `max_length`), answer_mask (list of bool), content_hash (int64, of the
    row's messages or text before tokenisation), origin ("file:line").

    Raises `UserError` for a source that is not there, too many bad rows, no usable row, and a row that holds the token
    `mask_token_id`.
    """
    options = Options(
        phase, max_length, answers, overlong, bad_row_budget, mask_token_id, debug, seed if debug else None
    )
    source = open_source(dataset)
    folder = _cache_folder(cache_dir)
    fingerprint = _fingerprint(source, tokenizer, options)
    stored = folder / fingerprint
    if stored.is_dir():
        report = json.loads((stored / "report.json").read_text())
        print(f"data: {dataset}: {report['summary']}; already tokenised in {stored}", flush=True)
        return datasets.Dataset.from_file(str(stored / "rows.arrow"))
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{fingerprint}.", ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        report = _write(source, tokenizer, options, made / "rows.arrow")
        (made / "report.json").write_text(json.dumps(dataclasses.asdict(report) | {"summary": report.summary()}))
        with contextlib.suppress(FileExistsError, OSError) if stored.is_dir() else contextlib.nullcontext():
            made.rename(stored)
    print(f"data: {dataset}: {report.summary()}; tokenised in {stored}", flush=True)
    return datasets.Dataset.from_file(str(stored / "rows.arrow"))


def _cache_folder(cache_dir: str | Path | None) -> Path:
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "difflm_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the cache of tokenised data cannot be written ({one_line(error)})") from error
    return folder


def _fingerprint(source: Source, tokenizer: PreTrainedTokenizerBase, options: Options) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # left behind by earlier calls, and set anew by each
        vocabulary.pop(state, None)
    parts = (
        _FORMAT_VERSION,
        source.name,
        source.fingerprint,
        vocabulary,
        tokenizer.chat_template,
        {key: str(token) for key, token in tokenizer.special_tokens_map.items()},
        dataclasses.asdict(options),
    )
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(source: Source, tokenizer: PreTrainedTokenizerBase, options: Options, path: Path) -> Report:
    """Writes the examples to `path`, chunk by chunk, and raises `UserError` if there are too many bad rows or none good."""
    report = Report()
    rows = _choose(source.rows(), DEBUG_EXAMPLES, options.seed) if options.debug else source.rows()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for chunk in itertools.batched(rows, _CHUNK_ROWS):
            pass
    return report
