"""Tests that we read the same tensors as safetensors, into memory that jax need not copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difflm_jax.checkpoint.safetensors import open_files
from difflm_jax.errors import UserError


@pytest.fixture
def path(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "model.safetensors"
    shapes = {"odd": (3, 5, 7), "row": (33,), "one": (), "none": (0, 4)}
    tensors = {
        f"{name}.{dtype}": np.asarray(rng.normal(size=shape) * 9).astype(jnp.dtype(dtype))
        for name, shape in shapes.items()
        for dtype in ("float32", "float16", "bfloat16", "uint8")
    }
    save_file(tensors, path, metadata={"format": "pt", "odd": "not a tensor"})
    return path


def test_tensors_are_those_of_the_library(path):
    files = open_files([path], dtypes=("F32", "F16", "BF16", "U8"))
    expected = load_file(path)
    assert files.shapes.keys() == expected.keys() and len(expected) == 16 and not files.defects
    for name, tensor in expected.items():
        found = files.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert found.tobytes() == tensor.tobytes()


def test_jax_takes_them_as_they_are(path):
    read = open_files([path]).read
    for name in ("odd.float32", "odd.bfloat16", "row.float16"):
        tensor = read(name)
        assert jax.device_put(tensor).unsafe_buffer_pointer() == tensor.ctypes.data


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_file_that_was_cut_off_after_it_was_opened(path, left):
    """It is cut off before the header, within it, or before the last byte of the data."""
    files = open_files([path], dtypes=("F32", "F16", "BF16", "U8"))
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with pytest.raises(UserError, match=r"model.safetensors: \w+.\w+ cannot be read; has the file changed\?"):
        for name in files.shapes:
            files.read(name)
