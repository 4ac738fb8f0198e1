"""The preview shows what the first step sees, and leaves nothing behind."""

import re
import sys

import jax
import numpy as np

from difflm_jax.train import command
from tests.tiny_run import make_model, make_rows, train_arguments


def test_a_preview_shows_the_masks_of_the_first_step_and_writes_nothing(tmp_path, capsys, monkeypatch):
    from difflm_jax.training import loop

    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.jsonl")
    arguments = train_arguments(model, rows, tmp_path)
    assert command([*arguments, "--preview"]) == 0
    shown = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl", "cache"}
    for phase in ("pretrain", "sft"):
        assert re.search(rf"^{phase}: \d+ rows", shown, re.MULTILINE)
    assert re.search(r"a step: 2 x 4 rows of up to 64 columns; 6 steps in all", shown)
    assert re.search(r"real tokens: \d+\.\d% of the columns; masked in the first step: \d+\.\d%", shown)

    # An example is shown whole where what all begin with stands in its row once.
    assert command([*arguments, "--config.batching=shared", "--preview"]) == 0
    found = re.findall(
        r"rows\.jsonl:(\d+): (\d+) tokens, prompt (\d+), (\d+) of (\d+) masked.*\n  (.*)", capsys.readouterr().out
    )
    for number, length, prompt, _, candidates, text in found:
        assert int(length) == int(prompt) + int(candidates) and f"{int(number) - 1}+1" in re.sub("[⟦⟧▸]", "", text)
    assert len(found) > 6

    # The masks are those of training: the same batch and key reach the training step.
    sft = shown[shown.index("\nsft:") :]
    line = re.search(r"rows\.jsonl:(\d+): (\d+) tokens, prompt (\d+), (\d+) of (\d+) masked.*\n  (.*)", sft)
    number, length, prompt, hidden, candidates = map(int, line.groups()[:5])
    assert f"{number - 1}+1" in line[6].split("▸")[0].replace("⟦", "").replace("⟧", "")
    assert length == prompt + candidates
    seen = []

    class SeenError(Exception):
        pass

    def stop(options, *_):
        def step(_params, _state, batch, key, index):
            seen.append((options.corruption, jax.device_get(batch), jax.random.fold_in(key, index)))
            raise SeenError

        return step

    monkeypatch.setattr(loop, "make_train_step", stop)
    with np.testing.assert_raises(SeenError):
        command([*arguments, "--config.phases=['sft']"])
    from difflm_jax.diffusion.corruption import corrupt

    corruption, batch, key = seen[0]
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    noisy = corrupt(key, whole, corruption)
    assert int(noisy.masked[0].sum()) == hidden
    assert int(whole.example_ids[0, 0]) >= 0


def test_colours_are_for_terminals(tmp_path, capsys, monkeypatch):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert command([*train_arguments(model, rows, tmp_path), "--preview"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[30;43m" in shown and "\x1b[2m" in shown and "⟦" not in shown.split("pretrain")[1]


def test_a_bad_configuration_is_one_line(tmp_path, capsys):
    assert command(["train", "--config.model=nowhere/at/all", "--preview"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_own_columns_and_a_chat_template_of_the_config_reach_the_rows(tmp_path, capsys):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.jsonl")
    rows.write_text(rows.read_text().replace("question", "frage").replace("answer", "antwort"))
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    arguments = train_arguments(model, rows, tmp_path, f"--config.chat_template={tmp_path / 'mine.jinja'}")
    assert command([*arguments, "--preview"]) == 1
    assert "has the keys antwort, frage; known formats" in capsys.readouterr().err
    assert command([*arguments, "--config.data.columns=question=frage,answer=antwort", "--preview"]) == 0
    shown = re.sub("[⟦⟧▸]", "", capsys.readouterr().out)
    assert re.search(r"\[user\]\d+\+1\[assistant\]", shown)
