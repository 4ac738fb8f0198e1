"""From rows to examples: which rows are used, which are bad and why, and how each fits into `max_length`."""

import dataclasses
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from difflm_jax.data.chat import ANSWERS, OVERLONG, Encoded, cut, encode_rendered, encode_texts, windows
from difflm_jax.data.columns import parse_naming
from difflm_jax.data.formats import Conversation, parse_row
from difflm_jax.data.keys import Notes, announcement, note
from difflm_jax.data.messages import check_unicode
from difflm_jax.data.rows import Row, RowError, Source
from difflm_jax.data.templates import render_answers, render_whole
from difflm_jax.errors import UserError

PHASES = ("pretrain", "sft")
DEBUG_EXAMPLES = 100

_CHUNK_ROWS = 512
_SHOWN_BAD_ROWS = 5
_PROGRESS_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that, with the rows and the tokenizer, determine the examples.

    phase: "sft" requires conversations with an answer; "pretrain" also takes conversations without one, and plain text,
      which it cuts into windows of `max_length`.
    answers: which assistant turns are marked, the "last" or "all".
    overlong: "cut" (see `difflm_jax.data.chat.cut`) or "drop".
    bad_row_budget: largest share of bad rows that may be left out with a notice; more is an error.
    mask_token_id: a token that no row may hold.
    debug: 100 examples, chosen by `seed`.
    columns, roles: the data set's own names (`difflm_jax.data.columns`).
    """

    phase: str
    max_length: int
    answers: str = "last"
    overlong: str = "cut"
    bad_row_budget: float = 0.01
    mask_token_id: int | None = None
    debug: bool = False
    seed: int = 42
    columns: str = ""
    roles: str = ""

    def __post_init__(self) -> None:
        for key, known in (("phase", PHASES), ("answers", ANSWERS), ("overlong", OVERLONG)):
            if getattr(self, key) not in known:
                raise UserError(f"{key}={getattr(self, key)!r}: must be one of {', '.join(known)}")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length}: must be at least 2")
        if not 0 <= self.bad_row_budget <= 1:
            raise UserError(f"bad_row_budget={self.bad_row_budget}: is a share of the rows, between 0 and 1")
        parse_naming(self.columns, self.roles)


@dataclasses.dataclass
class Report:
    """Counts how the rows of `name` were used."""

    name: str
    rows: int = 0
    examples: int = 0
    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: Notes = dataclasses.field(default_factory=Notes)
    cut: int = 0
    dropped: int = 0
    bad: int = 0
    first_bad: list[str] = dataclasses.field(default_factory=list)

    def add_bad(self, row: Row, error: RowError) -> None:
        self.bad += 1
        if len(self.first_bad) < _SHOWN_BAD_ROWS:
            self.first_bad.append(f"{row.origin}: {error}")

    def summary(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.most_common())
        counts = (
            (self.cut, f"{self.cut} cut to max_length"),
            (self.dropped, f"{self.dropped} dropped as longer than max_length"),
            (self.bad, f"{self.bad} bad rows left out: {self._listed_bad()}"),
        )
        said = [announcement(self.notes)] if self.notes else []
        said += [text for count, text in counts if count]
        return "; ".join([f"data: {self.name}: {self.examples} examples from {self.rows} rows ({formats})", *said])

    def check(self, bad_row_budget: float) -> None:
        """Raises `UserError` if more rows are bad than the budget allows, or no example is left."""
        if not self.rows:
            raise UserError(f"{self.name}: holds no rows")
        if self.bad > bad_row_budget * self.rows:
            raise UserError(
                f"{self.name}: {self.bad} of {self.rows} rows are bad, more than bad_row_budget={bad_row_budget:g} "
                f"allows: {self._listed_bad()}"
            )
        if not self.examples:
            why = f"{self.dropped} are longer than max_length" if self.dropped else self._listed_bad()
            raise UserError(f"{self.name}: none of its {self.rows} rows is left: {why}")

    def _listed_bad(self) -> str:
        more = self.bad - len(self.first_bad)
        return "; ".join(self.first_bad) + (f"; and {more} more" if more else "")


@dataclasses.dataclass(frozen=True)
class Example:
    """A row of the stored data set. `content_hash` is the hash of its messages or text before tokenisation."""

    encoded: Encoded
    content_hash: int
    origin: str


def examples(
    source: Source, tokenizer: PreTrainedTokenizerBase, options: Options, report: Report
) -> Iterator[list[Example]]:
    """Yields the examples of `source` in chunks of a few hundred rows; `report` counts them.

    Bad rows are left out and counted; `Report.check` raises at the end if there are too many. A row that contains the
    mask token raises `UserError` at once.
    """
    rows = source.rows()
    if options.debug:
        rows = iter(_choose(rows, DEBUG_EXAMPLES, options.seed))
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
        made = _examples_of_chunk(chunk, tokenizer, options, report)
        if options.debug:  # a long text is many examples
            made = made[: DEBUG_EXAMPLES - report.examples]
        report.examples += len(made)
        yield made
        if report.rows % _PROGRESS_ROWS < len(chunk) <= report.rows - len(chunk):
            print(f"data: {report.name}: {report.rows} rows read", flush=True)


def _choose(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """Draws `count` rows uniformly, in random order, by reservoir sampling. No row is parsed."""
    generator = random.Random(seed)
    chosen: list[Row] = []
    for i, row in enumerate(rows):
        if i < count:
            chosen.append(row)
        elif (place := generator.randrange(i + 1)) < count:
            chosen[place] = row
    generator.shuffle(chosen)
    return chosen


def _examples_of_chunk(
    chunk: list[Row], tokenizer: PreTrainedTokenizerBase, options: Options, report: Report
) -> list[Example]:
    """Parses each row on its own, tokenises all texts of a kind in one call, and fits each to `max_length`."""
    read = [found for row in chunk if (found := _read(row, tokenizer, options, report)) is not None]
    plain = [(text, found.row) for found in read for text in found.texts if isinstance(text, str)]
    ends, begins = ([not row.continues for _, row in plain], [not row.continued for _, row in plain])
    encoded_texts = iter(encode_texts(tokenizer, [text for text, _ in plain], ends, begins))
    chats = [text for found in read for text in found.texts if not isinstance(text, str)]
    encoded_chats = iter(encode_rendered(tokenizer, chats))
    made: list[Example] = []
    for found in read:
        encoded = [next(encoded_texts if isinstance(text, str) else encoded_chats) for text in found.texts]
        made += _examples_of_row(found, encoded, options, report)
    return made


@dataclasses.dataclass(frozen=True)
class _ReadRow:
    """A row's format, the hash of its content, and its texts: plain ones, or rendered ones in pieces."""

    row: Row
    format: str
    content_hash: int
    texts: list[str] | list[tuple[str, ...]]


def _read(row: Row, tokenizer: PreTrainedTokenizerBase, options: Options, report: Report) -> _ReadRow | None:
    """Parses and renders a row; None for a bad one, which is counted."""
    report.rows += 1
    notes = Notes()
    try:
        name, content = parse_row(row.load(), parse_naming(options.columns, options.roles), notes)
        found = _ReadRow(row, name, _content_hash(content), _render(content, tokenizer, options, notes))
    except RowError as error:
        report.add_bad(row, error)
        return None
    report.notes.update(dict.fromkeys(notes, 1))  # a row counts once
    return found


def _examples_of_row(found: _ReadRow, encoded: list[Encoded], options: Options, report: Report) -> list[Example]:
    if not all(len(each.tokens) for each in encoded):
        report.add_bad(found.row, RowError("gives no tokens"))
        return []
    report.formats[found.format] += 1
    made = []
    for text, each in zip(found.texts, encoded, strict=True):
        _refuse_mask_token(found.row, each, options.mask_token_id)
        parts = windows(each, options.max_length) if isinstance(text, str) else _fit(each, options, report)
        made += [Example(part, found.content_hash, found.row.origin) for part in parts]
    return made


def _render(
    content: Conversation | str, tokenizer: PreTrainedTokenizerBase, options: Options, notes: Notes
) -> list[str] | list[tuple[str, ...]]:
    if isinstance(content, str):
        if options.phase == "sft":
            raise RowError("plain text has no answer, which the sft phase needs; use it for pretraining")
        return [content]
    if options.phase == "sft":
        return render_answers(tokenizer, content, options.answers, notes)
    if content.untrained:
        note(notes, "weight 0 of an answer is not used (pretraining trains every token)")
        content = dataclasses.replace(content, untrained=frozenset())
    if all(message["role"] != "assistant" for message in content.messages):
        return [render_whole(tokenizer, content)]
    return render_answers(tokenizer, content, options.answers, notes)


def _content_hash(content: Conversation | str) -> int:
    plain = content if isinstance(content, str) else [content.messages, content.tools]
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(check_unicode(text), digest_size=8).digest(), signed=True)


def _refuse_mask_token(row: Row, encoded: Encoded, mask_token_id: int | None) -> None:
    if mask_token_id is not None and (encoded.tokens == mask_token_id).any():
        raise UserError(
            f"{row.origin}: holds the mask token (id {mask_token_id}), which no data may hold; remove the row or set "
            "mask_token to another token"
        )


def _fit(encoded: Encoded, options: Options, report: Report) -> list[Encoded]:
    """Fits a conversation to `max_length`; an empty list if it is too long and `overlong` is "drop"."""
    fitted = cut(encoded, options.max_length, options.overlong)
    if fitted is None:
        report.dropped += 1
        return []
    report.cut += fitted is not encoded
    return [fitted]
