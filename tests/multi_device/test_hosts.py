"""Real processes that work as one over loopback, and runs that move between them, one device and eight."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from difflm_jax import evaluate, generate
from difflm_jax.cli import run_command
from difflm_jax.distributed.processes import _on_a_cluster
from difflm_jax.train import command
from difflm_jax.training import loop
from difflm_jax.training.metrics import read_metrics
from tests.multi_device.whole_run import stopping
from tests.tiny_run import make_model, make_rows, train_arguments

PROJECT = Path(__file__).parents[2]
LAUNCH = PROJECT / "scripts" / "launch"
ONE_PHASE = ("--config.phases=sft", "--config.epochs=6")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("parts")
    return make_model(directory / "model"), make_rows(directory / "rows.jsonl")


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """A run in one process on one device."""
    directory = tmp_path_factory.mktemp("whole")
    assert command(train_arguments(*parts, directory, *ONE_PHASE)) == 0
    return directory / "run"


def life(
    parts, directory: Path, stop_after: int, devices: int, processes: int = 1, mesh: tuple = (-1, 1, 1)
) -> tuple[int, str]:
    """(exit status, output) of one stretch of a run, ended by SIGTERM (to process 1 of two) or by itself."""
    if devices == processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Meter, "add", stopping(loop.Meter.add, stop_after))
            return command(train_arguments(*parts, directory, *ONE_PHASE)), ""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    run = [sys.executable, "-m", "tests.multi_device.whole_run", str(stop_after), str(processes - 1)]
    run += [*map(str, parts), str(directory), *ONE_PHASE, *sizes]
    launcher = [sys.executable, str(LAUNCH / "local.py"), f"--processes={processes}", f"--devices={devices}", "--"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if processes == 1:
        launcher = []
        environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [*launcher, *run], env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode in (0, 75), done.stderr[-3000:] + done.stdout[-3000:]
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_one_to_two_processes(parts, whole, tmp_path, capfd):
    """Elastic resume 8 devices -> 1 -> 2 processes, which SIGTERM to one of them stops together -> 2 processes, of
    which one has a full disk when a checkpoint is due: it is left out everywhere, and the run continues."""
    assert life(parts, tmp_path, 2, devices=8, mesh=(2, 2, 2))[0] == 75
    assert life(parts, tmp_path, 3, devices=1)[0] == 75
    assert life(parts, tmp_path, 2, devices=2, processes=2, mesh=(1, 4, 1))[0] == 75
    status, said = life(parts, tmp_path, 99, devices=2, processes=2, mesh=(2, 1, 2))
    assert status == 0
    assert len(re.findall(r"checkpoint \d+ could not be written \(the disk of one of the processes", said)) == 1

    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(whole)
    assert [(r["step"], sorted(r)) for r in ours] == [(r["step"], sorted(r)) for r in theirs]  # written once
    for name in ("loss", "eval_loss", "masked_nll", "tokens"):
        np.testing.assert_allclose(
            [r[name] for r in ours if name in r], [r[name] for r in theirs if name in r], rtol=1e-5, err_msg=name
        )
    expected = load_file(whole / "sft_model" / "adapter_model.safetensors")
    found = load_file(tmp_path / "run" / "sft_model" / "adapter_model.safetensors")
    for name, tensor in expected.items():
        # Adam's first steps divide by gradients that may be all rounding: a few entries of B move freely.
        difference = np.linalg.norm(found[name] - tensor) / np.linalg.norm(tensor)
        assert difference < 1e-4, (name, difference)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_answer_and_score_as_one(parts, whole, capfd):
    """`generate` and `evaluate` over a mesh of two processes print once what one device prints."""
    run = [f"--run={whole}", "--max_new_tokens=8", "--steps=4", "--prompt=1+1"]
    assert run_command(generate.main, generate.FLAGS, "", ["generate", *run]) == 0
    alone = capfd.readouterr().out
    launcher = [sys.executable, str(LAUNCH / "local.py"), "--processes=2", "--devices=2", "--"]
    done = subprocess.run(
        [*launcher, sys.executable, "-m", "difflm_jax.generate", *run, "--mesh=1,2,2"],
        cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == alone
    score = [f"--run={whole}", f"--data={parts[1]}", "--rows=6", "--max_new_tokens=4", "--tokens_per_pass=4"]
    assert run_command(evaluate.main, evaluate.FLAGS, "", ["evaluate", *score]) == 0
    done = subprocess.run(
        [*launcher, sys.executable, "-m", "difflm_jax.evaluate", *score],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    one, two = (re.findall(r"^ *(?:\d\.\d-\d\.\d|all) .*$", out, re.M) for out in (capfd.readouterr().out, done.stdout))
    assert one and one == two, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_every_weight_and_one_writes_them(parts, tmp_path):
    """`trained=all` with weights divided within a process and rows over both ends in the checkpoint of one device."""
    more = ("--config.trained=all", "--config.learning_rate=1e-3", "--config.phases=sft", "--config.epochs=1")
    assert command(train_arguments(*parts, tmp_path / "one", *more)) == 0
    run = train_arguments(*parts, tmp_path / "two", *more, "--config.mesh.data=2", "--config.mesh.fsdp=2")
    launcher = [sys.executable, str(LAUNCH / "local.py"), "--processes=2", "--devices=2", "--"]
    done = subprocess.run(
        [*launcher, sys.executable, "-m", "difflm_jax.train", *run[1:]],
        cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    expected, found = (
        load_file(tmp_path / each / "run" / "sft_model" / "model.safetensors") for each in ("one", "two")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.linalg.norm(found[name] - tensor) / np.linalg.norm(tensor) < 1e-5, name


def test_flags_that_do_not_belong_together_are_refused(capfd):
    assert run_command(generate.main, generate.FLAGS, "", ["generate", "--model=x", "--prompt=a", "--process_id=1"])
    assert "--process_id needs --coordinator_address, --num_processes too" in capfd.readouterr().err
    named = ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"]
    assert run_command(generate.main, generate.FLAGS, "", ["generate", "--model=x", "--prompt=a", *named])
    assert "--process_id=2: must be at least 0 and below --num_processes=2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_clusters_are_known_by_their_environment(environment, found):
    assert _on_a_cluster({"JAX_PLATFORMS": "cpu", **environment}) == found


def test_the_launcher_gives_the_first_failure_and_ends_the_others(tmp_path):
    code = "import sys, time; time.sleep(0 if '--process_id=1' in sys.argv else 60); sys.exit(3)"
    launcher = [sys.executable, str(LAUNCH / "local.py"), "--processes=2", "--grace=1", "--"]
    assert subprocess.run([*launcher, sys.executable, "-c", code], timeout=30, check=False).returncode == 3


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_pod.sh"])
def test_launch_scripts_are_valid_bash_and_explain_themselves(script):
    path = LAUNCH / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and path.name in done.stdout


def test_the_jobset_is_one_that_kubernetes_would_take():
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert "difflm_jax.train" in " ".join(container["command"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    rules = job["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule["onExitCodes"]["values"]) for rule in rules] == [("FailJob", [1])]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}  # others start it again
