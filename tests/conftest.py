"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

_SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, checkpoints and data sets that may lie beside the project; skips without it."""
    if not _SHARED.is_dir():
        pytest.skip("no shared data beside the project")
    return _SHARED
