"""Tests that GGUF arrays read at once equal those that `gguf.GGUFReader` reads one by one."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from difflm_jax.checkpoint.gguf.reader import Reader


def test_fields_and_tensors_are_those_of_gguf(tmp_path) -> None:
    path = tmp_path / "some.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["a", "", "ünïcode", "中文", "x" * 300])
    writer.add_token_scores([0.5, -1.0, 3.0])
    writer.add_token_types([1, 2, 3])
    writer.add_array("flags", [True, False, True])
    writer.add_uint32("number", 7)
    writer.add_string("text", "after the arrays")
    writer.add_tensor("w", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own, expected = Reader(path), GGUFReader(path)
    assert list(own.fields) == list(expected.fields)
    for name, field in expected.fields.items():
        assert own.fields[name].contents() == field.contents(), name
        assert own.fields[name].types == field.types
        assert own.fields[name].contents(slice(1, 3)) == field.contents(slice(1, 3)) if len(field.data) > 2 else True
    (tensor,), (theirs,) = own.tensors, expected.tensors
    np.testing.assert_array_equal(tensor.data, theirs.data)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux counts a process's pages of files there")
def test_tensors_that_were_read_no_longer_count_as_memory_and_keep_their_bytes(tmp_path) -> None:
    path, values = tmp_path / "large.gguf", np.arange(8 << 20, dtype=np.float32)
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("w", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = Reader(path)
    (tensor,) = reader.tensors
    np.testing.assert_array_equal(tensor.data, values)  # every page is read
    read = _file_kib()
    reader.release()
    assert read - _file_kib() > 0.9 * values.nbytes / 1024
    np.testing.assert_array_equal(tensor.data, values)


def _file_kib() -> int:
    """Pages of mapped files in this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1])
