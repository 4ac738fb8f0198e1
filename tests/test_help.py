"""What the commands say: help, the nearest name, messages that lead on, and no import that help need not wait for."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import difflm_jax
from difflm_jax import UserError, evaluate, generate, plan, plot, train
from difflm_jax.cli import COMMANDS, difflm, run_command
from difflm_jax.sampling.text import Generation
from difflm_jax.view import terminal
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def said(capsys, *words: str) -> str:
    """The error of a command line that must fail."""
    assert difflm(["difflm", *words]) == 1
    return capsys.readouterr().err


def test_the_list_of_commands_waits_for_no_jax():
    program = "import sys; from difflm_jax.cli import difflm; difflm(['difflm']); sys.exit('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0 and all(name in out.stdout for name in COMMANDS)


def test_help_shows_every_flag_in_its_group_with_its_default(capsys):
    for door in (generate, evaluate, plan, plot, train):
        assert door.command(["difflm", "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"--{name}=" in shown or f"--[no]{name}" in shown for name in door.FLAGS)
    generate.command(["difflm", "--help"])
    shown = capsys.readouterr().out
    flags, model, decoding = (shown.index(title) for title in ("\nFlags:", "\nModel:", "\nDecoding"))
    assert flags < shown.index("--max_new_tokens=128") < model < shown.index("--adapter=...") < decoding
    assert decoding < shown.index("--threshold=NUMBER") and "--dtype=bfloat16|float32|auto\n      Default:" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean difflm train?"),
        (["train", "--learning_rate=1e-4"], "did you mean --config.learning_rate?"),
        (["train"], "name a config with --config=FILE"),
        (["train", "--config=configs/quickstrat.py"], "there are configs/"),
        (["plan", "--config=nowhere/else.py"], "no such file"),
        (["generate", "--max_tokens=8"], "did you mean --max_new_tokens?"),
        (["generate", "--prompt=Hi"], "--model=... or a training run with --run=..."),
        (["plot", "--run=nope", "--out=a.png"], "--run=nope: not a training run"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_by_what_was_meant(words, message, capsys):
    error = said(capsys, *words)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_run_given_as_a_model_is_told_from_one(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").touch()
    assert f"write --run={tmp_path}" in said(capsys, "generate", f"--model={tmp_path}", "--prompt=Hi")


def test_a_run_opened_as_a_model_in_python_names_its_model(tmp_path):
    (tmp_path / "config.json").write_text('{"phases": ["sft"]}')
    with pytest.raises(UserError, match="is a training run: --run="):
        difflm_jax.load(tmp_path)


def test_rows_without_an_answer_are_named_before_anything_is_previewed(tmp_path, model_dir, capsys):
    rows = [f'{{"messages": [{{"role": "user", "content": "Hi {n}"}}]}}\n' for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    keys = [f"--config.model={model_dir}", f"--config.dataset={tmp_path / 'rows.jsonl'}", "--config.test_size=0.3"]
    assert difflm(["difflm", "train", *keys, "--preview"]) == 1
    shown = capsys.readouterr()
    assert "rows.jsonl" in shown.err and "masked tokens stand" not in shown.out


def test_chat_rows_given_to_a_task_of_numbers_name_the_task_that_takes_them(tmp_path, model_dir, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "response": "2"}\n')
    arguments = ["evaluate", f"--model={model_dir}", f"--data={tmp_path / 'rows.jsonl'}", "--task=gsm8k"]
    assert "rows.jsonl:1: has no text under 'answer' (--task=gsm8k; rows like this" in said(capsys, *arguments)


def test_a_base_without_an_adapter_says_that_it_cannot_fill_masks(model_dir, capsys):
    arguments = ["generate", f"--model={model_dir}", "--dtype=float32", "--prompt=Hi", "--max_new_tokens=4", "--stats"]
    assert run_command(generate.main, generate.FLAGS, "", arguments) == 0
    notes = capsys.readouterr().err
    assert "was never trained to fill masks" in notes and "tokens in 4 passes" in notes
    assert run_command(generate.main, generate.FLAGS, "", [*arguments, "--causal"]) == 0
    assert "never trained" not in capsys.readouterr().err


def test_tokens_that_fill_a_canvas_up_after_the_end_are_not_counted():
    out = Generation(["a b"], [np.arange(3)], np.array([4]), np.array([128]))
    assert generate._stats(out, False, 1.0).startswith("3 tokens in 4 passes (0.75 per pass)")


def test_a_terminal_without_a_size_is_drawn_on_as_one_of_80_columns(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
    with Path(os.devnull).open() as stream:
        assert terminal._size(stream) == (80, 24)
