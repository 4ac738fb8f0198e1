"""The README and the pages: links between pages resolve, and the program accepts every command."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from absl import flags

from difflm_jax.cli import difflm
from difflm_jax.config.files import load_config, take_overrides

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOORS = ("train", "generate", "evaluate", "export", "plan", "plot", "serve")
PLACEHOLDER = "..."


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(text: str) -> str:
    """Returns the page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.is_file(), target
        assert not anchor or anchor in _anchors(linked), target


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/name:pymdownx.superfences.fence_code_format", "fence")
    named = re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"]))
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES if "docs" in page.parts)


def _commands(text: str) -> list[list[str]]:
    """The lines of shell code that start this program, as words."""
    code = "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))
    code += "\n" + "\n".join(re.findall(r"`((?:difflm|bash|python -m)\s[^`]+)`", text))
    lines = [shlex.split(line, comments=True) for line in re.sub(r"\\\n", " ", code).splitlines()]
    return [found for line in lines if (found := _own(line))]


def _own(words: list[str]) -> list[str]:
    """[door, arguments ...] of a line that starts a command of ours, else nothing."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    match words:
        case ["difflm", door, *rest]:
            return [door, *rest]
        case ["python", "-m", module, *rest] if module.startswith("difflm_jax."):
            return [module.removeprefix("difflm_jax."), *rest]
        case ["bash", "scripts/quickstart.sh", *rest]:
            return ["train", "--config=configs/quickstart.py", *rest]
        case ["bash", "scripts/run.sh", config, *rest]:
            return ["train", f"--config={config}", *rest]
    return []


COMMANDS = [(_name(page), words) for page in PAGES for words in _commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_commands_of_the_pages_are_accepted(page, words):
    door, *arguments = words
    if door in ("--help", "recipes", "init", "tune"):
        assert difflm(["difflm", door, "--help"][: 2 if door == "--help" else 3]) == 0
        return
    if door not in DOORS:
        importlib.import_module(f"difflm_jax.{door}")
        return
    overrides, others = take_overrides(arguments)
    config = next((word.partition("=")[2] for word in others if word.startswith("--config=")), "")
    if config != PLACEHOLDER:
        load_config(str(ROOT / config) if config else "", overrides)
    known = importlib.import_module(f"difflm_jax.{door}").FLAGS
    for word in others:
        name = word.partition("=")[0].removeprefix("--")
        if word in (PLACEHOLDER, "--help"):
            continue
        assert word.startswith("--"), word
        assert name in known or name.removeprefix("no") in known, word
        value = word.partition("=")[2]
        if value and PLACEHOLDER not in value:
            known[name].parser.parse(value)


def test_pages_hold_commands_to_check():
    assert len(COMMANDS) > 40
    assert isinstance(importlib.import_module("difflm_jax.generate").FLAGS, flags.FlagValues)


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"], ids=_name)
def test_files_that_a_contributor_is_sent_to_exist(page):
    named = re.findall(r"`([\w./]+(?:\.py|\.md|\.sh|\.toml|\.yml|/))`", page.read_text(encoding="utf-8"))
    missing = [name for name in named if not ((ROOT / "difflm_jax" / name).exists() or (ROOT / name).exists())]
    assert named and not missing
