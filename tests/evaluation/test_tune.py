"""`difflm tune`: the chosen setting, the file that it is written to, and its use in decoding."""

import json
import runpy

import pytest

import difflm_jax
from difflm_jax import UserError
from difflm_jax.cli import difflm
from difflm_jax.evaluation.sweep import Point, Trial, candidates, chosen, front
from difflm_jax.evaluation.tasks import read_questions
from tests.sampling.test_speculative import drafter
from tests.test_lm import randomly_adapted
from tests.tiny_checkpoint import save_tiny_model
from tests.tiny_run import make_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model directory, adapter directory, rows)."""
    directory = tmp_path_factory.mktemp("tune")
    model = save_tiny_model(directory / "model")
    randomly_adapted(model, "full", False).save_adapter(directory / "adapter")
    return model, directory / "adapter", make_rows(directory / "rows.jsonl", 6)


def point(name, right, speed):
    return Point({"algorithm": name}, [True] * right + [False] * (40 - right), 10.0, speed)


def test_the_front_is_what_nothing_beats_and_the_fastest_that_is_as_good_is_kept():
    slow, best, near = point("slow", 30, 5.0), point("best", 36, 10.0), point("near", 35, 20.0)
    poor, worst = point("poor", 12, 40.0), point("worst", 11, 30.0)
    points = [slow, worst, best, poor, near]
    assert front(points) == [poor, near, best]
    assert chosen(points) is near
    assert chosen([best, poor]) is best


def test_a_setting_is_found_written_and_decodes_from_then_on(made, tmp_path, capsys):
    model, adapter, rows = made
    words = ["--try=algorithm=steady threshold=0.03", "--try=algorithm=probability tokens_per_pass=4 block_length=8"]
    plot = tmp_path / "tune.svg"
    arguments = [f"--model={model}", f"--adapter={adapter}", f"--data={rows}", "--dtype=float32", f"--plot={plot}"]
    assert difflm(["difflm", "tune", *arguments, "--max_new_tokens=16", "--rows=3", *words]) == 0
    shown = capsys.readouterr().out
    assert "threshold=0.03" in shown and "chosen" in shown and plot.read_text().lstrip().startswith("<?xml")
    written = json.loads((adapter / "diffusion_config.json").read_text())
    assert len(written["preset"]["evidence"]["tried"]) == 2 and written["attention"] == "full"
    assert written["preset"]["evidence"]["data"] == rows.name and str(rows.parent) not in json.dumps(written)
    options = written["preset"]["options"]

    lm = difflm_jax.load(model, adapter=adapter, dtype="float32")
    plain = randomly_adapted(model, "full", False)
    given = {name: value for name, value in options.items() if name != "tokens_per_pass"}
    if "tokens_per_pass" in options:
        given["steps"] = 16 // options["tokens_per_pass"]
    tuned, expected = lm.generate("Hi", 16), plain.generate("Hi", 16, **given)
    assert tuned.tokens[0].tolist() == expected.tokens[0].tolist() and tuned.steps[0] == expected.steps[0]
    other = lm.generate("Hi", 16, algorithm="random"), plain.generate("Hi", 16, algorithm="random")
    assert other[0].tokens[0].tolist() == other[1].tokens[0].tolist()
    assert not difflm_jax.load(model, adapter=adapter, attention="prefix").diffusion.preset
    lm.save_adapter(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "diffusion_config.json").read_text())["preset"] == written["preset"]


def test_it_runs_as_a_module_too(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("difflm_jax.evaluation.tune", run_name="__main__")
    assert ended.value.code == 0 and "--max_new_tokens" in capsys.readouterr().out


def test_a_drafting_adapter_is_tried_with_what_its_drafts_promise(made):
    model, _, rows = made
    lm, questions = drafter(model), read_questions(str(rows), 2, "exact")
    found = candidates(lm, questions, Trial(12))
    assert len(found) == 4 and all({*options} == {"strategy", "draft_length", "lookup"} for options in found)
    with pytest.raises(UserError, match="nothing to tune"):
        candidates(lm.base(), questions, Trial(12))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the held-out rows with --data"),
        (["--data=x.jsonl", "--try=threshhold=0.9"], "'threshhold=0.9' is not an option of decoding"),
        (["--data=x.jsonl", "--try=threshold=high"], "threshold is of type float"),
    ],
)
def test_what_cannot_be_tried_is_one_line(made, words, message, capsys):
    assert difflm(["difflm", "tune", f"--model={made[0]}", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_damaged_preset_is_named(made, tmp_path):
    model, adapter, _ = made
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    known = json.loads((copy / "diffusion_config.json").read_text())
    (copy / "diffusion_config.json").write_text(json.dumps({**known, "preset": {"options": {"threshold": 7}}}))
    with pytest.raises(UserError, match=r"preset: threshold must be in \(0, 1\]"):
        difflm_jax.load(model, adapter=copy)
