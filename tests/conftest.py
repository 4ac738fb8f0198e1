"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

_PROJECT = Path(__file__).parents[1]
_SHARED = _PROJECT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, checkpoints and data sets that may lie beside the project; skips without it."""
    if not _SHARED.is_dir():
        pytest.skip("no shared data beside the project")
    return _SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, a real pretrained chat model; skips without it."""
    path = _PROJECT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("no SmolLM2 (bash scripts/fetch_smollm2.sh puts it into models/)")
    return path
