"""Tests what several processes decide and write together."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from difflm_jax.distributed.processes import by_one_process
from difflm_jax.errors import UserError
from difflm_jax.training import resume

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("index", [0, 1])
def test_a_write_that_fails_in_one_process_fails_in_all(monkeypatch, index):
    def write():
        raise UserError("out: no space left")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda here: np.array([False, True]))
    with pytest.raises(UserError, match=["no space left", "out: process 0 could not write it"][index]):
        by_one_process(write, "out")
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda here: np.array([True, True]))
    written = []
    by_one_process(lambda: written.append(index), "out")
    assert written == ([0] if index == 0 else [])


@pytest.mark.parametrize("index", [0, 1])
def test_one_process_of_several_reads_all_tokens_for_the_digest(monkeypatch, index):
    """Regression: every process hashed every token of the data at each start."""
    rows = {"sft": ([1, 2, 3], [4])}
    told = {"sft": {"train_rows": 3, "test_rows": 1, "digest": "d"}}
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    read = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(resume, "describe_data", lambda *both: read.append(both) or told["sft"])
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda here: np.array([here, here]))
    monkeypatch.setattr(
        multihost_utils, "broadcast_one_to_all", lambda here: np.asarray(len(text)) if here.ndim == 0 else text
    )
    assert resume.describe_rows(rows) == told
    assert read == ([rows["sft"]] if index == 0 else [])
    with pytest.raises(UserError, match="the processes do not have the same rows"):
        resume.describe_rows({"sft": ([1, 2], [4])})


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_checkpoint_that_one_process_cannot_write_fails_in_all_at_once(process, tmp_path):
    """Two real processes. With orbax 0.12.8 alone, one waits 20 minutes for the other, whose disk is full."""
    command = [sys.executable, str(PROJECT / "scripts/launch/local.py"), "--processes=2", "--devices=1", "--"]
    command += [sys.executable, "-m", "tests.distributed.failing_save", str(tmp_path / "ck"), str(process)]
    with (tmp_path / "said").open("w+") as said:
        started = subprocess.Popen(command, cwd=PROJECT, stdout=said, stderr=said, start_new_session=True)
        try:
            status = started.wait(timeout=60)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
        said.seek(0)
        text = said.read()
    assert status == 0, text
    failures = re.findall(rf"checkpoint 1 could not be written \(process {process}: .*File too large.*; training", text)
    assert len(failures) == 1, text
    assert sorted(re.findall(r"process \d has \[2\]", text)) == ["process 0 has [2]", "process 1 has [2]"], text
