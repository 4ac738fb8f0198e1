"""The model and the rows of tests that run the training command."""

from pathlib import Path

import pytest

from tests.tiny_run import make_model, make_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
