"""`metrics.jsonl`: strict lines and exact truncation."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.errors import UserError
from difflm_jax.training.metrics import SAMPLES_FILE, MetricsLog, read_metrics

PHASES = ("pretrain", "sft")


def _strict(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def _log(tmp_path, *places):
    log = MetricsLog(tmp_path)
    for phase, step in places:
        log.append({"phase": phase, "step": step, "loss": step / 3})
    return log


def _places(tmp_path):
    return [(record["phase"], record["step"]) for record in read_metrics(tmp_path)]


def test_nothing_is_written_before_the_first_record(tmp_path):
    log = MetricsLog(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    log.append({"phase": "sft", "step": 1})
    assert read_metrics(tmp_path / "run") == [{"phase": "sft", "step": 1}]


def test_a_log_of_another_name_beside_it(tmp_path):
    log = MetricsLog(tmp_path, SAMPLES_FILE)
    log.append({"phase": "sft", "step": 1, "answer": "größer\u2028 als\n"})
    assert [path.name for path in tmp_path.iterdir()] == [SAMPLES_FILE]
    log.cut_back(PHASES, "sft", 1)
    assert _strict(log.path.read_text(encoding="utf-8"))["answer"] == "größer\u2028 als\n"
    log.cut_back(PHASES, "sft", 0)
    assert log.path.read_text() == ""


def test_a_line_is_strict_json_and_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(
        {
            "phase": "sft",
            "step": np.int64(3),
            "loss": jnp.float32(0.5),
            "perplexity": float("inf"),
            "grad_norm": np.float32("nan"),
            "low": -math.inf,
            "mfu": None,
            "eval_by_mask_rate": {"0.1-0.2": {"masked_nll": np.array([1.0, np.nan])}},
        }
    )
    (line,) = log.path.read_text().splitlines()
    assert _strict(line) == {
        "phase": "sft",
        "step": 3,
        "loss": 0.5,
        "perplexity": "Infinity",
        "grad_norm": "NaN",
        "low": "-Infinity",
        "mfu": None,
        "eval_by_mask_rate": {"0.1-0.2": {"masked_nll": [1.0, "NaN"]}},
    }
    (record,) = read_metrics(tmp_path)
    assert record["perplexity"] == math.inf and record["low"] == -math.inf and math.isnan(record["grad_norm"])
    assert math.isnan(record["eval_by_mask_rate"]["0.1-0.2"]["masked_nll"][1])


@pytest.mark.parametrize(
    ("phase", "step", "kept"),
    [
        ("sft", 4, [("pretrain", 2), ("pretrain", 4), ("sft", 2), ("sft", 4)]),
        ("sft", 3, [("pretrain", 2), ("pretrain", 4), ("sft", 2)]),
        ("sft", 0, [("pretrain", 2), ("pretrain", 4)]),
        ("pretrain", 2, [("pretrain", 2)]),
        ("pretrain", 0, []),
    ],
)
def test_cut_back_keeps_what_the_checkpoint_covers(tmp_path, phase, step, kept):
    log = _log(tmp_path, ("pretrain", 2), ("pretrain", 4), ("sft", 2), ("sft", 4), ("sft", 6))
    log.append({"phase": "report", "exact_match": 0.5})
    before = log.path.read_bytes()
    log.cut_back(PHASES, phase, step)
    assert _places(tmp_path) == kept
    assert before.startswith(log.path.read_bytes())  # the kept lines byte for byte
    log.append({"phase": phase, "step": step + 1})
    assert _places(tmp_path) == [*kept, (phase, step + 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_back_goes_by_the_order_given(tmp_path):
    log = _log(tmp_path, ("sft", 5), ("pretrain", 3))
    log.cut_back(("sft", "pretrain"), "pretrain", 2)
    assert _places(tmp_path) == [("sft", 5)]


def test_cut_back_that_drops_nothing_leaves_the_file_alone(tmp_path):
    log = _log(tmp_path, ("pretrain", 2), ("pretrain", 4))
    before = log.path.stat()
    log.cut_back(PHASES, "pretrain", 4)
    assert (log.path.stat().st_ino, log.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    MetricsLog(tmp_path / "none").cut_back(PHASES, "pretrain", 0)  # no file yet
    assert not (tmp_path / "none").exists()


def test_a_line_that_a_kill_has_torn_is_dropped(tmp_path):
    log = _log(tmp_path, ("pretrain", 2))
    with log.path.open("a") as file:
        file.write('{"phase": "pretrain", "st')
    assert _places(tmp_path) == [("pretrain", 2)]
    log.cut_back(PHASES, "pretrain", 5)
    assert log.path.read_text().endswith("}\n")
    log.append({"phase": "pretrain", "step": 4})
    assert _places(tmp_path) == [("pretrain", 2), ("pretrain", 4)]


@pytest.mark.parametrize("line", ["nonsense", "[1]"])
def test_a_foreign_line_is_named(tmp_path, line):
    log = _log(tmp_path, ("pretrain", 2))
    with log.path.open("a") as file:
        file.write(line + "\n")
    before = log.path.read_bytes()
    for action in (lambda: read_metrics(tmp_path), lambda: log.cut_back(PHASES, "pretrain", 1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: not "):
            action()
    assert log.path.read_bytes() == before
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "nowhere")
