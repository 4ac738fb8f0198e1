"""Rows of Arrow tables: parquet files, data sets of the hub, and what `datasets` saved to disk.

A column has the fields of all its rows, so a row gets nulls that it never had. They are removed where a model would
learn them. Columns of type Json in `datasets` (`arrow.json` in Arrow) hold JSON text, which is decoded at any depth.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from difflm_jax.data.rows import Row, RowError
from difflm_jax.errors import UserError, one_line

BATCH_ROWS = 1000

# Fields whose keys differ from row to row.
_FREE_FORM = ("arguments", "tools", "functions", "parameters", "chat_template_kwargs")

# Decodes the values of a column after `to_pylist`; None if they need no decoding.
Decode = Callable[[Any], Any] | None


class RowBatch(NamedTuple):
    """A few rows of a table, with the decoders of its columns."""

    table: pa.RecordBatch | pa.Table
    decoders: dict[str, Callable[[Any], Any]]


def read_parquet(name: str, path: Path) -> Iterator[Row]:
    """Yields the rows of a parquet file. Raises `UserError` for a file that is not parquet."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from table_rows(name, file.iter_batches(batch_size=BATCH_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: is not a readable parquet file ({one_line(error)})") from error


def table_rows(name: str, batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Row]:
    """Yields rows with origins 'name[index]', numbered across batches."""
    index = 0
    for table in batches:
        decoders = {field.name: decode for field in table.schema if (decode := _decoder(field.type)) is not None}
        batch = RowBatch(table, decoders)
        for i in range(table.num_rows):
            yield Row(f"{name}[{index}]", functools.partial(_load, batch, i))
            index += 1


def _load(batch: RowBatch, i: int) -> dict[str, Any]:
    try:
        row = batch.table.slice(i, 1).to_pylist()[0]
        for column, decode in batch.decoders.items():
            row[column] = decode(row[column])
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    return _without_added_nulls(row)


def _decoder(kind: pa.DataType) -> Decode:
    """Returns the decoder for values of type `kind`: it parses JSON and turns maps into dictionaries."""
    if isinstance(kind, pa.JsonType):
        return _parse_json
    if pa.types.is_map(kind):
        items = _decoder(kind.item_type) or (lambda value: value)
        return _unless_null(lambda pairs: {key: items(value) for key, value in pairs})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        element = _decoder(kind.value_type)
        return element and _unless_null(lambda values: [element(value) for value in values])
    if pa.types.is_struct(kind):
        fields = {field.name: decode for field in kind.fields if (decode := _decoder(field.type)) is not None}
        return (
            _unless_null(lambda row: row | {key: decode(row[key]) for key, decode in fields.items()})
            if fields
            else None
        )
    if isinstance(kind, pa.BaseExtensionType):
        return _decoder(kind.storage_type)
    return None


def _unless_null(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else decode(value)


def _parse_json(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"a column of type Json holds text that is not JSON ({one_line(error)})") from error


def _without_added_nulls(value: Any, free_form: bool = False) -> Any:
    """Removes the nulls that Arrow adds to arguments and tools, which get the fields of all rows of their column."""
    if isinstance(value, list):
        return [_without_added_nulls(each, free_form) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_added_nulls(each, free_form or key in _FREE_FORM)
        for key, each in value.items()
        if each is not None or not free_form
    }
