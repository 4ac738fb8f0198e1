"""Runs that are interrupted, run out of disk, or hit NaN: they lose nothing, and report it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.train import command
from difflm_jax.training import loop, meter, run
from difflm_jax.training.interruption import stop_request
from difflm_jax.training.metrics import MetricsLog, read_metrics
from difflm_jax.utils.locks import FileLock
from tests.tiny import tiny_config, tiny_params
from tests.tiny_run import NF4_PACKED, results, train_arguments

NAN_BYTE = "Z"


@pytest.fixture(scope="module")
def whole(model, rows, tmp_path_factory) -> Path:
    """The directory of an undisturbed run (read only)."""
    directory = tmp_path_factory.mktemp("whole")
    assert command(train_arguments(model, rows, directory, *NF4_PACKED)) == 0
    return directory / "run"


def signal_at(monkeypatch, steps: set[int], number: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a signal when the metrics of these steps (counted over the run) are read."""
    plain, seen = meter.Meter.add, []

    def add(self, *arguments):
        seen.append(1)
        if len(seen) in steps:
            os.kill(os.getpid(), number)
        return plain(self, *arguments)

    monkeypatch.setattr(loop.Meter, "add", add)


@pytest.mark.slow
def test_a_terminated_run_saves_and_goes_on_to_the_same_bits(model, rows, whole, tmp_path, monkeypatch, capfd):
    """SIGTERM between two metric lines, and inside the second phase: N steps are k steps and the rest, bit by bit, over
    a base in NF4, with packed rows, dropout and accumulation."""
    arguments = train_arguments(model, rows, tmp_path, *NF4_PACKED)
    signal_at(monkeypatch, {2, 7})  # the second life begins after step 2, with its evaluation
    assert command(arguments) == 75
    error = capfd.readouterr().err
    assert error.startswith("stopped by SIGTERM after step 2 of 6 of pretrain")
    assert "checkpoint 2" in error and "\n" not in error.strip()
    assert command(arguments) == 75
    assert "of sft" in capfd.readouterr().err
    assert command(arguments) == 0
    assert results(tmp_path / "run") == results(whole)


def test_a_signal_between_two_phases_is_not_lost_and_a_late_report_is_made(model, rows, tmp_path, monkeypatch, capfd):
    plain = run.save

    def save(*arguments):
        plain(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    short = ("--config.epochs=1", "--config.max_steps=1", "--config.sample_prompts=0")
    arguments = train_arguments(model, rows, tmp_path, *short)
    assert command([*arguments, "--config.warmup_steps=2"]) == 1
    assert "warmup_steps=2: the phase has only 1 steps" in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(run, "save", save)
    assert command(arguments) == 75
    assert "stopped by SIGTERM after pretrain" in capfd.readouterr().err
    assert not (tmp_path / "run" / "sft_model").exists()
    monkeypatch.undo()
    assert command(arguments) == 0
    assert "sft: batching rows" in capfd.readouterr().out
    report = (f"--config.report.data={rows}", "--config.report.rows=2", "--config.report.max_new_tokens=4")
    assert command([*arguments, *report]) == 0
    printed = capfd.readouterr().out
    assert "this run is finished" in printed and "Questions (2," in printed


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_begins_nothing_new_and_costs_no_number(
    model, rows, whole, tmp_path, monkeypatch, capfd
):
    """It made the rest of the evaluation, one more step and another evaluation. Now the resumed run evaluates."""
    plain, seen = loop.evaluation_record, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) in (1, 3):
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(loop, "evaluation_record", interrupted)
    arguments = train_arguments(model, rows, tmp_path, *NF4_PACKED)
    assert command(arguments) == 75
    said = capfd.readouterr()
    assert said.err.splitlines()[-1].startswith("stopped by SIGINT after step 2 of 6 of pretrain")
    assert "sample" not in said.out and not any("eval_loss" in r for r in read_metrics(tmp_path / "run"))
    assert command(arguments) == 75  # the late evaluation is made, the next one interrupted
    assert "after step 4 of 6" in capfd.readouterr().err
    assert command(arguments) == 0
    assert results(tmp_path / "run") == results(whole)


def test_a_second_start_of_a_run_says_who_trains_into_it(model, rows, tmp_path, capfd):
    arguments = train_arguments(model, rows, tmp_path, "--config.max_steps=1", "--config.sample_prompts=0")
    lock = FileLock(tmp_path / "run" / "run.lock")
    (tmp_path / "run").mkdir()
    lock.acquire(wait=False)
    assert command(arguments) == 1
    assert re.search(r"run: process \d+ on \S+ trains into it right now", capfd.readouterr().err)
    lock.release()
    (tmp_path / "run" / "run.lock").write_text("process 1 on a host that crashed")  # the lock is gone with its process
    assert command([*arguments, "--config.phases=sft"]) == 0
    assert not (tmp_path / "run" / "run.lock").exists()
    capfd.readouterr()

    # A kill between what a phase trained and its settings; a moved run, under another spelling.
    (tmp_path / "run" / "sft_model" / "training_config.json").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    monkey = [a for a in arguments if "output_dir" not in a]
    moved = f"--config.output_dir={tmp_path}/./moved"
    spelt = f"--config.model={model.parent}/./{model.name}"
    assert command([*monkey, moved, spelt, "--config.phases=sft"]) == 0
    assert (tmp_path / "moved" / "sft_model" / "training_config.json").is_file()
    assert "sft: finished already" in capfd.readouterr().out


def test_adapters_start_alike_whatever_the_order_in_which_weights_were_read():
    """A run killed before its first checkpoint starts again from the kept conversion, read in another order."""
    params = tiny_params(tiny_config())
    turned = {
        **params,
        "layers": {
            block: dict(reversed(projections.items())) for block, projections in reversed(params["layers"].items())
        },
    }
    one, other = (init_lora(jax.random.key(0), p, LoraConfig(r=4), jnp.zeros(32)) for p in (params, turned))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    again = LoraConfig(r=4, target_modules=tuple(reversed(LoraConfig().target_modules)))
    jax.tree.map(np.testing.assert_array_equal, one, init_lora(jax.random.key(0), params, again, jnp.zeros(32)))


def test_a_second_ctrl_c_is_meant_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reached() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def poisoned(rows: Path, directory: Path, bad: set[int], monkeypatch) -> Path:
    """`rows` with a token in the questions of some, which nothing masks, whose embedding is NaN."""
    plain = run.start

    def start(lm, config):
        lm = plain(lm, config)
        table = lm.params["embed_tokens"]["weight"].at[lm.tokenizer.convert_tokens_to_ids(NAN_BYTE)].set(np.nan)
        return dataclasses.replace(lm, params={**lm.params, "embed_tokens": {"weight": table}})

    monkeypatch.setattr(run, "start", start)
    lines = rows.read_text().splitlines()
    path = directory / "poisoned.jsonl"
    made = [{**json.loads(line), **({"question": NAN_BYTE} if i in bad else {})} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_a_nonfinite_step_changes_no_bit_and_names_its_rows(model, rows, tmp_path, monkeypatch, capfd):
    states = []
    plain = loop.make_train_step

    def recording(*arguments):
        step = plain(*arguments)

        def wrapped(params, state, *rest):
            before = jax.device_get(state)
            after, metrics = step(params, state, *rest)
            states.append((bool(metrics["finite"]), before, jax.device_get(after)))
            return after, metrics

        return wrapped

    monkeypatch.setattr(loop, "make_train_step", recording)
    data = poisoned(rows, tmp_path, {3}, monkeypatch)
    arguments = train_arguments(model, data, tmp_path, "--config.phases=sft", "--config.test_size=0")
    assert command(arguments) == 0
    skipped = [(before, after) for finite, before, after in states if not finite]
    assert len(skipped) == 2  # one step of each epoch has the row
    for before, after in skipped:
        jax.tree.map(np.testing.assert_array_equal, before, after)
    records = read_metrics(tmp_path / "run")
    reported = [record["nonfinite"] for record in records if "nonfinite" in record]
    assert len(reported) == 2
    for each in reported:
        assert f"{data}:4" in each["rows"]
        assert each["rows"][each["example_ids"].index(3)] == f"{data}:4"
    assert records[-1]["skipped_steps"] == 2
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)
    assert "the step is skipped" in capfd.readouterr().out


def test_nonfinite_steps_in_a_row_end_the_run_with_batch_and_checkpoint(model, rows, tmp_path, monkeypatch, capfd):
    data = poisoned(rows, tmp_path, set(range(8, 24)), monkeypatch)  # of 24 rows, 8 a step: hardly a step without one
    more = ("--config.phases=sft", "--config.test_size=0", "--config.max_nonfinite_steps=3", "--config.epochs=4")
    arguments = train_arguments(model, data, tmp_path, *more)
    assert command(arguments) == 1
    error = capfd.readouterr().err.strip()
    assert "3 consecutive steps, up to step 3," in error and "\n" not in error
    with np.load(tmp_path / "run" / "nonfinite" / "sft-step3.npz", allow_pickle=False) as batch:
        assert batch["tokens"].shape[:2] == (2, 4)
        assert (batch["example_ids"] >= 8).any()
    assert "resumes from checkpoint" in error
    monkeypatch.undo()  # no embedding is NaN any more
    assert command(arguments) == 0
    assert "from step 3" in capfd.readouterr().out


def test_another_data_set_is_refused_with_the_difference_or_forced(model, rows, tmp_path, capfd):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    arguments = train_arguments(model, data, tmp_path)
    assert command([*arguments, "--config.phases=pretrain"]) == 0
    shutil.rmtree(tmp_path / "run" / "pretrain_model")
    data.write_text(data.read_text().replace("23.", "24."))
    before = read_metrics(tmp_path / "run")
    assert command([*arguments, "--config.phases=pretrain"]) == 1
    error = capfd.readouterr().err
    assert "holds a run with other data (pretrain: " in error and "--force" in error
    assert read_metrics(tmp_path / "run") == before
    assert command([*arguments, "--config.phases=pretrain", "--config.max_steps=1", "--force"]) == 1
    said = capfd.readouterr()
    assert "resumes with other data" in said.out and "but the phase has only 1 steps now" in said.err
    assert command([*arguments, "--config.phases=pretrain", "--force"]) == 0


@pytest.mark.slow
def test_what_changes_no_number_may_change_on_resume(model, rows, whole, tmp_path, capfd, monkeypatch):
    """Other micro-batches of the same rows, another mesh: no force is needed; a learning rate is refused, or forced."""
    signal_at(monkeypatch, {2})
    arguments = train_arguments(model, rows, tmp_path, *NF4_PACKED, "--config.phases=pretrain")
    assert command(arguments) == 75
    free = ("--config.batch_size=8", "--config.gradient_accumulation_steps=1", "--config.mesh.data=1")
    assert command([*arguments, *free, "--config.learning_rate=1e-3"]) == 1
    assert "(learning_rate: 0.0002 -> 0.001)" in capfd.readouterr().err
    assert command([*arguments, *free, "--config.gradient_accumulation_steps=3"]) == 1
    assert "rows_of_a_step.pretrain: 8 -> 24" in capfd.readouterr().err
    assert command([*arguments, *free]) == 0
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(whole)
    assert [r["loss"] for r in ours if "loss" in r] == pytest.approx(
        [r["loss"] for r in theirs if "loss" in r and r["phase"] == "pretrain"], rel=1e-5
    )


@pytest.mark.slow
def test_killed_at_seeded_moments_it_ends_in_the_same_bits():
    """Four SIGKILLs, two at least inside a save (more with `python -m tests.kills`), then a run to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills=4", "--seed=7"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["kills"] == 4 and report["inside_a_save"] >= 2 and report["equal"] == report["runs"] >= 1


def test_a_line_that_the_disk_refuses_waits_and_none_is_torn(tmp_path, capfd):
    code = """
import resource, signal, sys
from difflm_jax.training.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(sys.argv[1])
log.append({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
log.append({"step": 2, "more": "x" * 40})
log.append({"step": 3})
assert not log.flush()
assert log.path.read_text() == '{"step": 1}\\n'
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert log.flush()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert done.stdout.count("cannot be written") == 1 and done.stdout.count("can be written again") == 1


def test_only_an_enabled_log_writes(tmp_path):
    log = MetricsLog(tmp_path, enabled=False)
    log.append({"step": 1})
    assert log.flush() and not log.path.exists()


@pytest.mark.slow
def test_a_full_disk_costs_a_save_and_no_run(model, rows, whole, tmp_path):
    """On a small tmpfs that fills up in the middle: the save fails, the run continues and ends in the same bits."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], capture_output=True)
    if done.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        code = """
import sys
from pathlib import Path
from difflm_jax.train import command
from difflm_jax.training.checkpoints import Checkpoints
plain, filler = Checkpoints.save, Path(sys.argv[1]) / "filler"
def save(self, step, state, metrics):  # the disk is full while the first checkpoint of sft is written
    first = "sft" in str(self._directory) and step == 2
    if first:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 12)) == 1 << 12:
                    pass
            except OSError:
                pass
    plain(self, step, state, metrics)
    if first:
        self.settle()
        filler.unlink()
Checkpoints.save = save
sys.exit(command(sys.argv[2:]))
"""
        arguments = train_arguments(model, rows, mount, f"--config.cache_dir={tmp_path}", *NF4_PACKED)
        done = subprocess.run([sys.executable, "-c", code, str(mount), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "sft: checkpoint 2 could not be written" in done.stdout
        assert "training continues, the last one on disk is no checkpoint" in done.stdout
        assert results(mount / "run") == results(whole)
        assert not list((mount / "run").rglob("*tmp*"))
    finally:
        subprocess.run(["umount", str(mount)], check=True)
