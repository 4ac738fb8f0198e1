"""The page of a generation, opened in a real browser (headless Chromium): scrubbed, hovered, and photographed."""

import html.parser
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from difflm_jax import generate
from difflm_jax.cli import run_command
from tests.tiny_checkpoint import save_tiny_model

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Hovers over the first token, and reports what the page then shows.
_PROBE = """
<script>
addEventListener("load", () => {
  const token = document.querySelector("#canvas .token:not(.mask)") || document.querySelector("#canvas .token");
  token.dispatchEvent(new MouseEvent("mouseenter"));
  document.body.dataset.tip = document.getElementById("tip").innerText;
  document.body.dataset.pass = document.getElementById("where").innerText;
  document.body.dataset.masks = document.querySelectorAll("#canvas .mask").length;
  const guesses = [...document.querySelectorAll("#canvas .guess")];
  document.body.dataset.guesses = guesses.filter(guess => guess.textContent !== "░").length;
  document.body.dataset.tokens = document.querySelectorAll("#canvas .token").length;
  document.getElementById("next").click();
  document.body.dataset.next = document.getElementById("where").innerText;
  document.body.dataset.fetched = performance.getEntriesByType("resource").length;
});
</script>
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if not found:
        pytest.skip("no Chromium: install one (apt-get install chromium) or name it with CHROMIUM=")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    model = save_tiny_model(directory / "model")
    path = directory / "page.html"
    arguments = [
        "generate", f"--model={model}", "--dtype=float32", "--prompt=<b>Hi</b> & </script>", "--max_new_tokens=24",
        "--steps=6", "--algorithm=probability", "--eos_penalty=inf", f"--watch_html={path}",
    ]  # fmt: skip
    assert run_command(generate.main, generate.FLAGS, "", arguments) == 0
    return path


def browse(chromium: str, page: Path, place: str, *more: str) -> str:
    return browse_url(chromium, f"{page.as_uri()}#{place}", page.parent, "--virtual-time-budget=3000", *more)


def browse_url(chromium: str, url: str, directory: Path, *more: str) -> str:
    """Returns the page as Chromium prints it; its profile is in `directory`."""
    return subprocess.run(
        [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={directory / 'profile'}",
            "--window-size=1000,900", *more, url,
        ],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip


class _Body(html.parser.HTMLParser):
    """Keeps the attributes of the body."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self.attributes = dict(attrs)


def attributes(dom: str) -> dict[str, str]:
    parser = _Body()
    parser.feed(dom)
    return parser.attributes


@pytest.mark.slow
def test_the_page_works_in_a_browser(chromium, page, tmp_path):
    """Proves with a real Chromium that the page scrubs, shows alternatives on hovering, draws, and needs no network."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", _PROBE + "</body>"), encoding="utf-8")
    seen = {at: attributes(browse(chromium, probed, f"run=1&pass={at}", "--dump-dom")) for at in (0, 3)}
    for at, shown in seen.items():
        assert (shown["data-pass"], shown["data-next"]) == (f"pass {at} of 6", f"pass {at + 1} of 6")
        assert (shown["data-tokens"], shown["data-masks"]) == ("24", str(24 - 4 * at))
        assert shown["data-guesses"] == shown["data-masks"]
        assert shown["data-fetched"] == "0"
    assert "mask" in seen[0]["data-tip"] and "likeliest in pass 1" in seen[0]["data-tip"]
    assert "probability 0." in seen[3]["data-tip"] and "likeliest in pass" in seen[3]["data-tip"]

    pictures = {}
    for at in (0, 6):
        picture = tmp_path / f"{at}.png"
        browse(chromium, page, f"run=1&pass={at}", f"--screenshot={picture}")
        pictures[at] = pixels(picture)
        assert pictures[at].shape[:2] == (900, 1000)
        assert len(np.unique(pictures[at].reshape(-1, 3), axis=0)) > 50  # text with smooth edges, not a blank page
    # Between the first and the last pass tokens have got the colours of their confidence, and the bars their full ones.
    assert (np.abs(pictures[0].astype(int) - pictures[6]).max(axis=-1) > 20).sum() > 2000
    saturated = pictures[6].max(axis=-1).astype(int) - pictures[6].min(axis=-1)
    assert (saturated > 40).sum() > (pictures[0].max(axis=-1).astype(int) - pictures[0].min(axis=-1) > 40).sum() + 500


def pixels(path: Path) -> np.ndarray:
    image = pytest.importorskip("PIL.Image", reason="no Pillow to read the screenshot with")
    return np.asarray(image.open(path).convert("RGB"))
