"""Pictures of runs, and what is said where there is nothing to draw."""

import builtins
import json

import pytest

from difflm_jax import plot
from difflm_jax.cli import run_command


def write_run(directory, scale=1.0):
    directory.mkdir()
    lines = []
    for phase, steps in (("pretrain", 4), ("sft", 6)):
        for step in range(1, steps + 1):
            lines.append({"phase": phase, "step": step, "loss": scale / step, "masked_nll": 2 * scale / step})
        rates = {"0.0-0.2": {"masked_nll": 0.5 * scale}, "0.8-1.0": {"masked_nll": 3 * scale}}
        lines.append(
            {"phase": phase, "step": steps, "eval_loss": 1.0, "eval_masked_nll": 1.5, "eval_by_mask_rate": rates}
        )
    lines.insert(2, {"phase": "pretrain", "step": 2, "nonfinite": {"rows": []}})
    lines[1]["loss"] = "NaN"
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def command(*arguments):
    return run_command(plot.main, plot.FLAGS, "", ["plot", *arguments])


def test_steps_of_later_phases_follow_those_of_earlier_ones(tmp_path):
    records = plot.read_run(str(write_run(tmp_path / "run")))
    assert [r["at"] for r in records if "loss" in r] == list(range(1, 11))
    assert [r["at"] for r in records if "eval_loss" in r] == [4, 10]


@pytest.mark.parametrize("ending", plot.FORMATS)
def test_one_run_and_several_are_drawn(tmp_path, ending, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", 2.0)]
    for number in (1, 2):
        out = tmp_path / f"{number}.{ending}"
        assert command(f"--run={','.join(map(str, runs[:number]))}", f"--out={out}") == 0
        start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
        assert out.read_bytes().startswith(start) and out.stat().st_size > 10_000
    figure = plot.draw({str(runs[0]): plot.read_run(str(runs[0]))})
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Loss (as trained on)", "Masked NLL", "Held out, by mask rate", "Last evaluation of each phase"]
    trained, evaluated = figure.axes[1].get_lines()[:2]
    assert trained.get_ydata()[3] == 0.5 and len(trained.get_ydata()) == 10
    assert evaluated.get_xdata().tolist() == [4, 10]
    last = figure.axes[3].get_lines()[0]
    assert (last.get_xdata().tolist(), last.get_ydata().tolist()) == (
        [pytest.approx(0.1), pytest.approx(0.9)],
        [0.5, 3],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out={tmp}/a.png"], "name a training run with --run"),
        (["--run={tmp}/none", "--out={tmp}/a.png"], "none: not a training run (no metrics.jsonl there)"),
        (["--run={tmp}/run", "--out={tmp}/a.bmp"], "must end in .png, .svg, .pdf"),
        (["--run={tmp}/run", "--out={tmp}/nowhere/a.png"], "cannot be written"),
        (["--run={tmp}/empty", "--out={tmp}/a.png"], "its metrics hold no step yet"),
    ],
)
def test_bad_flags_are_named_in_one_line(tmp_path, arguments, message, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert command(*(argument.format(tmp=tmp_path) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("a.*"))


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    whole = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return whole(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert command(f"--run={write_run(tmp_path / 'run')}", f"--out={tmp_path / 'a.png'}") == 1
    assert "pip install -e '.[plot]'" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart():
    assert plot._labels(["a/run", "b/other"]) == {"a/run": "run", "b/other": "other"}
    assert plot._labels(["a/run", "b/run"]) == {"a/run": "./a/run", "b/run": "./b/run"}
    assert plot._labels(["a/_run"]) == {"a/_run": "./a/_run"}  # matplotlib keeps what begins so out of a legend
