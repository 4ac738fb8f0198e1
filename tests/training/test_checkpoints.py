"""What is saved comes back, the right checkpoints are kept, and a damaged or torn one is never taken for whole."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from difflm_jax.errors import UserError
from difflm_jax.training.checkpoints import Checkpoints
from difflm_jax.training.checksums import checksum_of


@struct.dataclass
class _State:
    lora: dict
    opt_state: tuple


def _state(seed: int = 0) -> _State:
    first, second = jax.random.split(jax.random.key(seed))
    lora = {"layers": {"lora_A": jax.random.normal(first, (3, 40, 50))}, "mask_row": jax.random.normal(second, (8,))}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(mu_dtype=jnp.bfloat16), optax.add_decayed_weights(0.0)
    )
    _, opt_state = optimizer.update(lora, optimizer.init(lora), lora)
    return _State(lora, opt_state)


def _assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_state_comes_back_in_a_new_process_s_manager(tmp_path):
    state = _state()
    checkpoints = Checkpoints(tmp_path / "ck", keep=2)
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    checkpoints.save(7, state, {"eval_loss": 1.5, "tokens": 12, "eval_by_mask_rate": {"0.1-0.2": {"masked_nll": 2.0}}})
    checkpoints.close()
    again = Checkpoints(tmp_path / "ck", keep=2)
    assert (again.steps(), again.latest(), again.best()) == ([7], 7, 7)
    assert again.metrics(7) == {"eval_loss": 1.5, "tokens": 12, "eval_by_mask_rate": {"0.1-0.2": {"masked_nll": 2.0}}}
    shapes = jax.eval_shape(lambda: state)  # no shardings: the first device
    _assert_equal(again.restore(7, shapes), state)
    _assert_equal(again.restore(7, state), state)


def test_a_plain_dictionary_of_lora_and_opt_state_too(tmp_path):
    state = {"lora": {"a": jnp.arange(6.0)}, "opt_state": optax.scale_by_adam().init({"a": jnp.zeros(6)})}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state)
    _assert_equal(checkpoints.restore(1, state), state)
    assert checkpoints.metrics(1) == {}


def test_saved_arrays_may_be_donated_at_once_and_restored_ones_too(tmp_path):
    """The save is asynchronous: a donation right after it must not reach what is being written."""
    state, expected = _state(), _state()
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: (x * 0 - 1).astype(x.dtype), tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state)
    overwritten = overwrite(state)
    restored = checkpoints.restore(1, expected)
    _assert_equal(restored, expected)
    overwrite(restored)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored))
    checkpoints.save(2, overwritten)
    _assert_equal(checkpoints.restore(2, expected), overwritten)


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    losses = {1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: None, 6: float("nan"), 7: 5.0}
    for step, loss in losses.items():
        checkpoints.save(step, {"a": jnp.full(3, step)}, {"eval_loss": loss})
    assert checkpoints.steps() == [3, 6, 7]
    assert (checkpoints.latest(), checkpoints.best()) == (7, 3)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2)  # a resumed run knows the best of the run before it
    again.save(8, {"a": jnp.full(3, 8)}, {"eval_loss": 4.0})
    assert (again.steps(), again.best()) == ([3, 7, 8], 3)
    again.save(9, {"a": jnp.full(3, 9)}, {"eval_loss": 0.5})
    assert (again.steps(), again.best()) == ([8, 9], 9)
    assert again.restore(9, {"a": jnp.zeros(3, jnp.int32)})["a"].tolist() == [9, 9, 9]


def test_without_evaluations_there_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, {"a": jnp.zeros(3)}, {"tokens": step})
    assert (checkpoints.steps(), checkpoints.best()) == ([2], None)


def test_an_unfinished_directory_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "ck", keep=3)
    checkpoints.save(1, _state())
    checkpoints.close()
    shutil.copytree(tmp_path / "ck" / "1", tmp_path / "ck" / "2.orbax-checkpoint-tmp")
    again = Checkpoints(tmp_path / "ck", keep=3)
    assert (again.steps(), again.latest()) == ([1], 1)
    again.save(2, _state(1))
    _assert_equal(again.restore(2, _state()), _state(1))


def _largest_file(step: Path) -> Path:
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _truncate(step: Path) -> None:
    path = _largest_file(step)
    path.write_bytes(path.read_bytes()[:100])


def _flip_one_bit(step: Path) -> None:
    path = _largest_file(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _flip_one_bit_of_a_name(step: Path) -> None:
    path = step / "_CHECKPOINT_METADATA"
    data = path.read_bytes()
    assert b"opt_state" in data
    path.write_bytes(data.replace(b"opt_state", b"opt_State", 1))


_DAMAGES = {
    "truncated": _truncate,
    "one bit flipped": _flip_one_bit,
    "one bit of a name flipped": _flip_one_bit_of_a_name,
    "data file gone": lambda step: _largest_file(step).unlink(),
    "data folder gone": lambda step: shutil.rmtree(step / "default" / "ocdbt.process_0"),
    "manifest empty": lambda step: (step / "default" / "manifest.ocdbt").write_bytes(b""),
    "metadata torn": lambda step: (step / "default" / "_METADATA").write_text("{"),
    "all arrays gone": lambda step: shutil.rmtree(step / "default"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, capfd, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, _state())
    checkpoints.close()
    _DAMAGES[damage](tmp_path / "1")
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path, keep=2).restore(1, _state())
    message = str(caught.value)
    assert str(tmp_path / "1") in message and "\n" not in message and len(message) < 500
    del caught
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "other",
    [{"a": jnp.zeros((2, 4))}, {"b": jnp.zeros((2, 3))}, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(1)}],
    ids=["shape", "name", "further leaf"],
)
def test_a_state_of_another_shape_is_refused(tmp_path, other):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"a": jnp.zeros((2, 3))})
    with pytest.raises(UserError, match=rf"{tmp_path}/1: the checkpoint and this run differ in \['[ab]'\]"):
        checkpoints.restore(1, other)
    with pytest.raises(UserError, match=f"{tmp_path}/5: the checkpoint is damaged"):
        checkpoints.restore(5, {"a": jnp.zeros((2, 3))})


def test_a_checksum_sees_every_change():
    state = {"a": jnp.arange(1000.0), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.arange(4, dtype=jnp.uint8)}
    checksum = int(checksum_of(state))
    for changed in (
        {**state, "a": state["a"].at[777].set(np.nextafter(np.float32(777), np.float32(0)))},
        {**state, "a": state["a"].at[jnp.array([3, 4])].set(jnp.array([4.0, 3.0]))},
        {**state, "b": -state["b"]},
        {**state, "c": state["c"].at[0].set(128)},
    ):
        assert int(checksum_of(changed)) != checksum


def test_a_directory_that_cannot_be_is_said_by_name(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path / "ck", keep=2)
    shutil.rmtree(tmp_path / "ck")
    (tmp_path / "ck").write_text("not a directory")
    checkpoints.save(1, _state())
    with pytest.raises(UserError, match=rf"{tmp_path}/ck: the last checkpoint \(1\) could not be written"):
        checkpoints.finish(1)
    assert capfd.readouterr().out.startswith(f"{tmp_path}/ck: checkpoint 1 could not be written")
    for thread in threading.enumerate():  # one that waits for ever would keep the process alive
        if "Signaling" in repr(thread):
            with contextlib.suppress(OSError):  # orbax's own threads raise their errors
                thread.join(timeout=10)
            assert not thread.is_alive()


def test_a_save_that_failed_does_not_hide_the_error_that_ends_the_process(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path / "ck", keep=2)
    checkpoints.save(1, _state())

    def full():
        raise OSError(28, "No space left on device")

    checkpoints._manager.wait_until_finished = full
    with pytest.raises(UserError, match="what ended it"), contextlib.closing(checkpoints):
        raise UserError("what ended it")
    assert "ck: checkpoint 1 could not be written ([Errno 28] No space left on device)" in capfd.readouterr().out


def test_orbax_says_nothing(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("absl").setLevel(logging.DEBUG)  # as under absl's own command-line runner
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, _state())
    checkpoints.restore(1, _state())
    checkpoints.close()
    assert [record for record in caplog.records if record.name == "absl"] == []
    assert capfd.readouterr() == ("", "")


def _run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_run_killed_inside_a_save_goes_on_from_the_checkpoint_before(tmp_path):
    """A process that dies while a checkpoint is being written leaves the one before it as the latest, and whole."""
    code = """
import os, signal, sys
import jax, jax.numpy as jnp
from difflm_jax.training.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=3)
state = {"a": jax.random.normal(jax.random.key(0), (4000, 4000))}
checkpoints.save(1, state)
checkpoints.save(2, jax.tree.map(lambda x: x + 1, state))
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = _run(code, str(tmp_path / "ck"))
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "ck" / "2.orbax-checkpoint-tmp").is_dir()  # the kill came in the middle
    checkpoints = Checkpoints(tmp_path / "ck", keep=3)
    assert (checkpoints.steps(), checkpoints.latest()) == ([1], 1)
    state = {"a": jax.random.normal(jax.random.key(0), (4000, 4000))}
    _assert_equal(checkpoints.restore(1, state), state)
    checkpoints.save(2, state)
    assert checkpoints.latest() == 2


@pytest.mark.slow
def test_a_full_disk_is_announced_and_keeps_the_checkpoints_before(tmp_path):
    """An error of the asynchronous writing (a limit on file sizes stands for a full disk) costs that save alone."""
    code = """
import resource, signal, sys
import jax, jax.numpy as jnp
from difflm_jax.training.checkpoints import Checkpoints
from difflm_jax.errors import UserError
checkpoints = Checkpoints(sys.argv[1], keep=2)
state = {"a": jax.random.normal(jax.random.key(0), (1000, 1000))}
checkpoints.save(1, state)
checkpoints.save(2, state)
checkpoints.settle()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints.save(3, state)
checkpoints.settle()
assert checkpoints.steps() == [1, 2]
try:
    checkpoints.finish(3)
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(4, state)
checkpoints.finish(4)
assert checkpoints.steps() == [2, 4]
checkpoints.close()
"""
    result = _run(code, str(tmp_path / "ck"))
    assert result.returncode == 0, result.stderr[-2000:]
    announced, refused = result.stdout.splitlines()
    assert announced.startswith(f"{tmp_path}/ck: checkpoint 3 could not be written")
    assert announced.endswith("training continues, the last one on disk is checkpoint 2")
    assert "the last checkpoint (3) could not be written; make room" in refused
    assert sorted(path.name for path in (tmp_path / "ck").iterdir()) == ["2", "4"]


@pytest.mark.parametrize("damage", _DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used_and_announced(tmp_path, capfd, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, _state(1), {"tokens": 1, "eval_loss": 2.0})
    checkpoints.save(2, _state(2), {"tokens": 2, "eval_loss": 1.0})
    checkpoints.close()
    _DAMAGES[damage](tmp_path / "2")
    again = Checkpoints(tmp_path, keep=2)
    restored = again.restore_latest(_state())
    assert (restored.step, restored.metrics["tokens"]) == (1, 1)
    _assert_equal(restored.state, _state(1))
    said = capfd.readouterr().out
    assert said.startswith(f"{tmp_path}/2: the checkpoint is damaged") and said.count("\n") == 1
    assert "it is kept as damaged-2" in said
    again.save(2, _state(3), {"tokens": 3})
    _assert_equal(again.restore_best(_state()).state, _state(1))
    assert again.restore_latest(_state()).metrics == {"tokens": 3}


def test_a_damaged_key_of_orbax_puts_a_checkpoint_aside(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, _state(step))
    checkpoints.close()
    path = tmp_path / "2" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes().replace(b"item_handlers", b"item_hanelers"))
    again = Checkpoints(tmp_path, keep=2)
    assert (again.restore_latest(_state()).step, again.steps()) == (1, [1])
    said = capfd.readouterr().out
    assert "item_hanelers" in said and said.count("\n") == 1 and "it is kept as damaged-2" in said


@pytest.mark.slow
def test_no_flipped_bit_and_no_cut_is_ever_taken_for_whole(tmp_path, capfd):
    """60 seeded damages anywhere in a checkpoint's files: it reads back bit for bit, or is set aside."""
    checkpoints = Checkpoints(tmp_path / "ck", keep=1)
    metrics = {"tokens": 12345, "eval_loss": 1.25}
    checkpoints.save(1, _state(), metrics)
    checkpoints.close()
    files = sorted(path.relative_to(tmp_path / "ck") for path in (tmp_path / "ck").rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    found = {"whole": 0, "damaged": 0}
    for trial in range(60):
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(tmp_path / "ck", copy)
        path = copy / files[trial % len(files)]
        data = bytearray(path.read_bytes())
        if not data:
            continue
        at = int(rng.integers(len(data)))
        if trial % 3 == 0:
            data = data[:at]
        else:
            data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        again = Checkpoints(copy, keep=1)
        restored = again.restore_latest(_state(1))
        again.close()
        if restored is not None:
            _assert_equal(restored.state, _state())
            assert restored.metrics == metrics
        found["whole" if restored else "damaged"] += 1
        shutil.rmtree(copy)
    print(found)
    assert found["damaged"] >= 20


@pytest.mark.slow
def test_restore_follows_the_shardings_of_the_abstract_state(tmp_path):
    """What two devices saved is restored onto four, split or replicated as the abstract state says."""
    code = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from difflm_jax.training.checkpoints import Checkpoints
values = np.arange(64, dtype=np.float32).reshape(8, 8)
def put(devices, spec):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return jax.device_put(values, NamedSharding(mesh, spec))
checkpoints = Checkpoints(sys.argv[1], keep=3)
checkpoints.save(1, {"split": put(2, P("data")), "whole": put(2, P())})
wanted = {"split": put(4, P(None, "data")), "whole": put(4, P())}
restored = checkpoints.restore(1, wanted)
for name in wanted:
    assert restored[name].sharding == wanted[name].sharding, restored[name].sharding
    np.testing.assert_array_equal(np.asarray(restored[name]), values)
print("good")
"""
    result = _run(code, str(tmp_path / "ck"), XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
    assert result.stdout == "good\n", result.stderr[-2000:]
