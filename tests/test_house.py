"""The layout keeps its rules: few modules at the top, files that can be read at once."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "difflm_jax"


def test_at_most_fourteen_modules_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def test_a_file_is_read_in_one_sitting():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 420} == {}


def test_every_folder_says_what_lives_there():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    silent = [folder for folder in folders if not (folder / "__init__.py").read_text().startswith('"""')]
    assert silent == []
