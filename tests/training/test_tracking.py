"""Weights & Biases: the data sent, and that its failures never stop a run."""

import os
import socket
import sys
import time
import types

import pytest
import wandb

from difflm_jax.config.files import load_config
from difflm_jax.training.tracking import Tracker


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """A user without an account: no key, no login, no settings in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


class _Run:
    """A stand-in for a W&B run that records its calls."""

    url, dir = "https://example.org/run", "/somewhere/offline-run-1/files"

    def __init__(self):
        self.logged, self.finished, self.metrics = [], 0, []

    def define_metric(self, *arguments, **options):
        self.metrics.append((*arguments, options))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch):
    """A `wandb` module whose `init` records its arguments in `fake.started`; `fake.fails` names modes that raise."""
    module = types.ModuleType("wandb")
    module.started, module.fails, module.run = [], (), _Run()

    def init(**options):
        module.started.append(options)
        if options["mode"] in module.fails:
            raise RuntimeError("no\nluck")
        return module.run

    def setup():
        url, key = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), os.environ.get("WANDB_API_KEY")
        own = types.SimpleNamespace(mode=os.environ.get("WANDB_MODE", "online"), api_key=key, base_url=url)
        return types.SimpleNamespace(settings=own)

    module.init, module.setup = init, setup
    module.Settings = dict
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def _config(tmp_path, *overrides):
    return load_config(overrides=[f"wandb_config.wandb_log_path={tmp_path / 'wandb'}", *overrides])


def _use(tracker):
    tracker.log("pretrain", {"loss": 1.5}, 10)
    tracker.table("pretrain", "samples", ["prompt", "answer"], [("a", "b")], 10)
    tracker.finish()
    tracker.log("pretrain", {"loss": 1.5}, 11)


def test_a_run_is_told_everything(tmp_path, fake, capsys):
    _use(Tracker(_config(tmp_path, "wandb_config.entity=us")))
    (options,) = fake.started
    assert (options["project"], options["entity"], options["mode"]) == ("llm-diffusion", "us", "offline")
    assert options["name"].startswith("llm-diffusion-") and options["dir"] == str(tmp_path / "wandb")
    assert options["config"]["lora_config"]["r"] == 16
    assert fake.run.logged == [
        {"pretrain/loss": 1.5, "pretrain/step": 10},
        {"pretrain/samples": (["prompt", "answer"], [["a", "b"]]), "pretrain/step": 10},
    ]
    assert fake.run.metrics == [
        ("pretrain/*", {"step_metric": "pretrain/step"}),
        ("sft/*", {"step_metric": "sft/step"}),
    ]
    assert fake.run.finished == 1
    assert capsys.readouterr().out == "wandb: offline (upload with: wandb sync /somewhere/offline-run-1)\n"


def test_debug_is_in_the_names_and_an_empty_entity_is_the_account_s_own(tmp_path, fake):
    Tracker(_config(tmp_path, "debug=true"))
    (options,) = fake.started
    assert options["project"] == "debug-llm-diffusion" and options["name"].startswith("debug-llm-diffusion-")
    assert options["entity"] is None


def test_trackio_is_told_the_same(tmp_path, monkeypatch, capsys):
    run, started, module = _Run(), [], types.ModuleType("trackio")
    module.init = lambda *arguments, **options: started.append((arguments, options)) or run
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "trackio", module)
    _use(Tracker(_config(tmp_path, "wandb_config.service=trackio")))
    ((project, name), options) = started[0]
    assert project == "llm-diffusion" and name.startswith("llm-diffusion-") and options["config"]["epochs"]
    assert [set(values) for values in run.logged] == [
        {"pretrain/loss", "pretrain/step"},
        {"pretrain/samples", "pretrain/step"},
    ]
    assert run.finished == 1 and "trackio show --project llm-diffusion" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["wandb_config.project=", "wandb_config.mode=disabled"])
def test_off_is_off_and_silent(tmp_path, fake, capsys, override):
    _use(Tracker(_config(tmp_path, override)))
    assert (fake.started, capsys.readouterr().out) == ([], "")
    assert not (tmp_path / "wandb").exists()


def test_the_mode_follows_the_account(tmp_path, fake, monkeypatch, capsys):
    def mode(*overrides):
        Tracker(_config(tmp_path, *overrides))
        return fake.started[-1]["mode"]

    assert mode() == "offline"
    assert mode("wandb_config.mode=online") == "online"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    (tmp_path / "netrc").chmod(0o600)
    assert mode() == "online"
    assert capsys.readouterr().out.endswith("wandb: https://example.org/run\n")
    assert mode("wandb_config.mode=offline") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # a login at another host is none here
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"


@pytest.mark.parametrize("setting", ["offline", "disabled", "WANDB_DISABLED"])
def test_nothing_leaves_where_wandb_is_set_offline_though_there_is_a_key(tmp_path, monkeypatch, capsys, setting):
    """`wandb offline` and `wandb disabled` write the mode into a settings file; the server here sees no connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        if setting == "WANDB_DISABLED":
            monkeypatch.setenv("WANDB_DISABLED", "true")
        else:
            (tmp_path / "wandb_config").mkdir()
            (tmp_path / "wandb_config" / "settings").write_text(f"[default]\nmode = {setting}\n")
        wandb.teardown()  # it reads its settings once
        tracker = Tracker(_config(tmp_path))
        _use(tracker)
        wandb.teardown()
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    said = capsys.readouterr().out
    assert ("offline (upload with" in said) == (setting == "offline")
    assert (tmp_path / "wandb").exists() == (setting == "offline")


def test_without_a_network_it_goes_on_offline(tmp_path, fake, capsys):
    fake.fails = ("online",)
    _use(Tracker(_config(tmp_path, "wandb_config.mode=online")))
    assert [options["mode"] for options in fake.started] == ["online", "offline"]
    assert len(fake.run.logged) == 2
    assert capsys.readouterr().out.splitlines() == [
        "wandb: cannot start in mode online (no luck)",
        "wandb: offline (upload with: wandb sync /somewhere/offline-run-1)",
    ]


def test_a_wandb_that_cannot_start_is_said_once(tmp_path, fake, capsys):
    fake.fails = ("online", "offline")
    _use(Tracker(_config(tmp_path)))
    assert capsys.readouterr().out == "wandb: cannot start in mode offline (no luck)\n"


def test_a_wandb_that_breaks_on_the_way_is_said_once(tmp_path, fake, capsys):
    def broken(values):
        raise OSError("disk full")

    fake.run.log = broken
    tracker = Tracker(_config(tmp_path))
    capsys.readouterr()
    _use(tracker)
    assert capsys.readouterr().out == "wandb: off from here on, metrics.jsonl continues (disk full)\n"
    assert fake.run.finished == 0


def test_a_wandb_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    _use(Tracker(_config(tmp_path)))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("wandb: cannot start in mode offline (")


def test_the_real_wandb_offline(tmp_path, capsys):
    """Starts the installed package; what it wrote is in its binary log."""
    tracker = Tracker(_config(tmp_path, "debug=true"))
    tracker.log("pretrain", {"loss": 1.5, "eval_by_mask_rate": {"0.1-0.2": {"masked_nll": 2.0}}}, 10)
    tracker.log("sft", {"loss": float("nan")}, 1)
    tracker.table("sft", "samples", ["prompt", "answer"], [("What?", "So.")], 1)
    tracker.finish()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"wandb: offline (upload with: wandb sync {tmp_path}/wandb/wandb/offline-run-")
    (log,) = (tmp_path / "wandb").rglob("offline-run-*/*.wandb")
    expected = (b"pretrain/loss", b"sft/samples", b"sft/step", b"debug-llm-diffusion")
    deadline = time.monotonic() + 10  # offline, wandb writes on for a moment after `finish`
    while not all(text in log.read_bytes() for text in expected) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [text for text in expected if text not in log.read_bytes()] == []
