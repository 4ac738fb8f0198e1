"""The scripts of examples/ run on a tiny model and print the promised output."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SAID = {
    "ask": " passes",
    "infill": "The capital of Italy is",
    "watch": "masks left",
    "score": "nats, base",
    "serve_and_ask": " passes",
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_every_example_is_run():
    assert sorted(SAID) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, str(model_dir)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAID[name] in capsys.readouterr().out
