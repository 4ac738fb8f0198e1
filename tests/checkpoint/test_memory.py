"""load, generate and train refuse weights that exceed memory before they read them, and refuse nothing else."""

import time

import jax
import pytest

from difflm_jax import UserError, generate, train
from difflm_jax.checkpoint import memory
from difflm_jax.cli import run_command
from difflm_jax.loading import ModelSpec, load, open_model
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=64)


@pytest.fixture
def pretended(monkeypatch):
    def pretend(total: int | None, free: int | None = None) -> None:
        monkeypatch.setattr(memory, "total_bytes", lambda: total)
        monkeypatch.setattr(memory, "free_bytes", lambda: total if free is None else free)

    return pretend


@pytest.fixture
def unread(monkeypatch):
    """Makes the test fail if weights are read."""
    monkeypatch.setattr("difflm_jax.lm.load_params", lambda *_: pytest.fail("weights were read"))


def test_the_weights_are_those_that_loading_makes(tiny_dir):
    for dtype in ("float32", "bfloat16"):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(load(tiny_dir, dtype=dtype).params))
        lm = open_model(ModelSpec(str(tiny_dir), dtype=dtype))
        assert memory.weight_bytes(lm, lm.model.dtype, None) == held


def test_only_what_cannot_fit_is_refused_and_it_costs_no_time(tiny_dir, pretended):
    lm = open_model(ModelSpec(str(tiny_dir), dtype="float32"))
    needed = memory.weight_bytes(lm, lm.model.dtype, None)
    pretended(needed, free=needed)
    assert "memory is tight" in memory.check_weights(lm, "--quantization", "--no")
    pretended(None, free=2 * needed)
    start = time.perf_counter()
    assert memory.check_weights(lm, "--quantization", "--no") is None
    assert time.perf_counter() - start < 0.2
    pretended(needed - 1)
    with pytest.raises(
        UserError, match=r"will not fit: needs 0\.0 GiB of 0\.0 for its weights; try --quantization=int8"
    ):
        memory.check_weights(lm, "--quantization", "--no")
    with pytest.raises(UserError, match="take a smaller model"):
        memory.check_weights(lm, "--quantization", "--no", are_trained=True)


def test_the_memory_of_this_machine_is_known():
    assert memory.total_bytes() >= memory.free_bytes() > 2**20


def test_generate_refuses_before_it_reads_and_obeys_its_flag(tiny_dir, pretended, unread, capsys):
    pretended(1000)
    arguments = ["generate", f"--model={tiny_dir}", "--dtype=float32", "--prompt=Hi"]
    assert run_command(generate.main, generate.FLAGS, "", arguments) != 0
    message = capsys.readouterr().err
    assert "will not fit: needs" in message and "--nocheck_fit loads it all the same" in message
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        run_command(generate.main, generate.FLAGS, "", [*arguments, "--nocheck_fit"])


def test_load_refuses_before_it_reads_and_obeys_its_argument(tiny_dir, pretended, unread, capsys):
    pretended(1000)
    with pytest.raises(UserError, match=r"will not fit: needs .*; check_fit=False loads it all the same"):
        load(tiny_dir)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        load(tiny_dir, check_fit=False)
    assert capsys.readouterr().err == ""
    pretended(2**40, free=1000)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        load(tiny_dir)
    assert "note: memory is tight" in capsys.readouterr().err


def test_train_refuses_before_it_reads_and_writes_nothing(tiny_dir, tmp_path, pretended, unread, capsys):
    pretended(1000)
    run = tmp_path / "run"
    assert train.command(["train", f"--config.model={tiny_dir}", f"--config.output_dir={run}"]) == 1
    assert "will not fit: needs" in capsys.readouterr().err
    assert not run.exists()
