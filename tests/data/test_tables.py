"""Tests that tables yield the same rows as .jsonl files."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from difflm_jax.data.formats import parse_row
from difflm_jax.data.sources import RowError, open_source

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SHAPES = [
    {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c", "name": "n"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": '"quoted"'},
        ],
        "tools": [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}],
    },
    {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], "tools": [{"name": "g"}]},
]


@pytest.fixture
def as_jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SHAPES))
    return path


def parsed(dataset: str) -> list[Any]:
    return [parse_row(row.load()) for row in open_source(dataset).rows()]


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_rows_that_differ_in_shape_mean_what_they_mean_as_jsonl(
    kind: str, as_jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: `load_dataset("json")` infers the type Json for them, so contents were trained with their quotes."""
    table = datasets.load_dataset("json", data_files=str(as_jsonl), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(table.features)
    name = str(tmp_path / f"table.{kind}")
    if kind == "parquet":
        table.to_parquet(name)
    elif kind == "saved":
        table.save_to_disk(name)
    else:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
        name = "owner/name"
    assert parsed(name) == parsed(str(as_jsonl))


def test_json_and_maps_are_decoded_wherever_they_are_nested(tmp_path: Path) -> None:
    json_in = pa.struct({"a": pa.list_(pa.struct({"b": pa.json_(), "c": pa.int64()}))})
    storage = pa.array([{"a": [{"b": '{"d": [1, null]}', "c": 1}, None]}, {"a": None}, None], _storage(json_in))
    messages = pa.array([[[("role", "user"), ("content", "x")]], None, []], pa.list_(pa.map_(pa.string(), pa.string())))
    table = pa.table({"deep": storage.cast(json_in), "messages": messages})
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, path)
    assert [row.load() for row in open_source(path).rows()] == [
        {"deep": {"a": [{"b": {"d": [1, None]}, "c": 1}, None]}, "messages": [{"role": "user", "content": "x"}]},
        {"deep": {"a": None}, "messages": None},
        {"deep": None, "messages": []},
    ]


def _storage(kind: pa.DataType) -> pa.DataType:
    return pa.struct({"a": pa.list_(pa.struct({"b": pa.string(), "c": pa.int64()}))})


def test_text_in_a_json_column_that_is_not_json_is_a_bad_row(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pa.table({"a": pa.array(["{", None], pa.string()).cast(pa.json_())}), path)
    bad, null = open_source(path).rows()
    assert null.load() == {"a": None}
    with pytest.raises(RowError, match="a column of type Json holds text that is not JSON"):
        bad.load()
