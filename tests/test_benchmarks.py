"""Benchmarks are not run here, but a name that they import may move."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # some are run as scripts, and import each other so
    importlib.import_module(f"benchmarks.{path.stem}")
