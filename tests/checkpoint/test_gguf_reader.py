"""Tests that GGUF arrays read at once equal those that `gguf.GGUFReader` reads one by one."""

import numpy as np
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
