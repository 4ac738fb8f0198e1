"""The layout keeps its rules: few modules at the top, models that know no diffusion, files that can be read at once."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "difflm_jax"
_DIFFUSION = re.compile(r"\b(diffusion|denois\w*|noisy|corrupt\w*|prompts?|block_length|logit_shift)\b", re.IGNORECASE)
_SAYS_SO = "Knows nothing of diffusion"  # the one sentence of models/__init__.py that may name it


def test_at_most_fourteen_modules_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_models_know_no_diffusion(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if _DIFFUSION.search(line) and _SAYS_SO not in line] == []


def test_a_file_is_read_in_one_sitting():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 420} == {}


def test_every_folder_says_what_lives_there():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    silent = [folder for folder in folders if not (folder / "__init__.py").read_text().startswith('"""')]
    assert silent == []
