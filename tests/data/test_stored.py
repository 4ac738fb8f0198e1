"""Columns of selected rows, read without `datasets`, are what `datasets` reads."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from difflm_jax.data.stored import column, tables


@pytest.fixture
def rows(tmp_path):
    """37 rows in record batches of 10, of a file."""
    lists = [list(range(i % 5)) for i in range(37)]
    table = pa.table({"tokens": pa.array(lists, pa.list_(pa.int32())), "length": pa.array(range(100, 137), pa.int32())})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
    return datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))


@pytest.mark.parametrize(
    "chosen", [range(37), range(5, 21), [], [0, 1, 2, 9, 10, 11, 30, 36], [7, 3, 3, 25]], ids=lambda x: str(len(x))
)
def test_selected_rows_are_those_of_datasets(rows, chosen):
    part = rows.select(chosen)
    assert column(part, "length").tolist() == list(part["length"])
    found = list(tables(part, ["tokens"], 4))
    assert [len(table) for table in found] == [min(4, len(part) - first) for first in range(0, len(part), 4)]
    assert [row for table in found for row in table["tokens"].to_pylist()] == list(part["tokens"])
    again = part.select(np.arange(len(part))[::-1])  # a selection of a selection
    assert column(again, "length").tolist() == list(again["length"])
