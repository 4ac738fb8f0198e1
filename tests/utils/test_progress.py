"""What is quick shows nothing; what is slow shows lines in a log and a bar on a terminal, never on standard output."""

import io
import re
import sys
import time

import jax
import jax.numpy as jnp
import pytest

import difflm_jax
from difflm_jax.utils import progress
from difflm_jax.utils.progress import Progress, announce_compilation
from tests.tiny_checkpoint import save_tiny_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(total: int | None, seconds: float = 0.02) -> None:
    with Progress("loading tiny", "tensors", total) as shown:
        for _ in range(4):
            time.sleep(seconds)
            shown.advance()


def test_what_is_quick_shows_nothing(capfd):
    work(4)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("total", [4, None])
def test_a_log_gets_lines_and_the_last_one_says_all(monkeypatch, capsys, total):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    work(total, 0.05)
    out, said = capsys.readouterr()
    first, last = said.splitlines()
    of = " of 4" if total else ""
    assert out == ""
    assert re.fullmatch(rf"loading tiny: \d{of} tensors, \d+ s", first)
    assert last.startswith(f"loading tiny: 4{of} tensors, ")


def test_a_terminal_gets_a_bar_that_is_removed_even_by_an_error(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(ValueError, match="broken"), Progress("loading [tiny]", "tensors", 4) as shown:
        time.sleep(0.3)
        shown.advance(2)
        time.sleep(0.2)
        raise ValueError("broken")
    said = terminal.getvalue()
    assert "loading [tiny]" in said and "2/4" in said and "━" in said
    assert said.endswith("\x1b[2K")  # the line is erased
    assert capsys.readouterr().out == ""


def test_one_piece_of_work_has_no_progress_to_show(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    with Progress("answering", "prompts", 1) as shown:
        time.sleep(0.05)
        shown.advance()
    assert capsys.readouterr().err == ""


def test_loading_and_answering_in_batches_say_how_far_they_are(monkeypatch, capsys, tmp_path):
    model = save_tiny_model(tmp_path)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    lm = difflm_jax.load(model, dtype="float32")
    said = capsys.readouterr().err
    assert re.search(rf"loading {re.escape(str(model))}: (\d+) of \1 tensors", said)
    lm.generate(["a", "b", "c"], 4, batch_size=2)
    assert "answering: 3 of 3 rows" in capsys.readouterr().err
    lm.generate(["a", "b", "c"], 4)
    assert "answering" not in capsys.readouterr().err  # one batch


def test_a_long_compilation_is_announced(monkeypatch, capsys):
    announce_compilation()
    monkeypatch.setattr(progress, "QUIET_SECONDS", 600.0)
    function = jax.jit(lambda x: jnp.linalg.svd(x @ x.T + time.monotonic())[0].sum())  # no program is kept for it
    function(jnp.ones((7, 7))).block_until_ready()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    function(jnp.ones((9, 9))).block_until_ready()
    assert "compiling a program (kept for the next start)" in capsys.readouterr().err
