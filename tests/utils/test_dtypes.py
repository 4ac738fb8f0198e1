"""`auto` is what the machine computes fastest, and what a run began with when it resumes."""

import jax
import jax.numpy as jnp
import pytest

import difflm_jax
from difflm_jax.config.files import load_config, to_json
from difflm_jax.training.resume import settle_dtype
from difflm_jax.utils import dtypes
from tests.tiny_run import make_model


@pytest.mark.parametrize(
    ("backend", "flags", "expected"),
    [
        ("cpu", "flags : fpu avx2 fma", "float32"),
        ("cpu", "flags : fpu avx512f amx_bf16 amx_tile", "bfloat16"),
        ("cpu", "flags : fpu avx512f avx512_bf16", "bfloat16"),
        ("cpu", None, "float32"),
        ("tpu", "flags : fpu avx2", "bfloat16"),
    ],
)
def test_a_processor_is_asked_for_its_matrix_unit(backend, flags, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(dtypes, "_CPU_INFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags + "\n")
    assert dtypes.fastest_dtype() == expected


def test_a_run_keeps_what_it_began_with(tmp_path, capsys):
    config = load_config("", ["dtype=auto", f"output_dir={tmp_path}"])
    assert settle_dtype(config).dtype == dtypes.fastest_dtype()
    other = {"bfloat16": "float32", "float32": "bfloat16"}[dtypes.fastest_dtype()]
    (tmp_path / "config.json").write_text(to_json(load_config("", [f"dtype={other}"])))
    assert settle_dtype(config).dtype == other
    assert f"dtype: {other}" in capsys.readouterr().out
    assert settle_dtype(load_config("", ["dtype=float32", f"output_dir={tmp_path}"])).dtype == "float32"


def test_a_model_can_be_loaded_in_it(tmp_path):
    assert difflm_jax.load(make_model(tmp_path / "model"), dtype="auto").model.dtype == jnp.dtype(
        dtypes.fastest_dtype()
    )
