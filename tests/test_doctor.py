"""Checks of a machine, each with its fix; recipes, and a directory created from one."""

import json
import os
import re
import urllib.request

import pytest

from difflm_jax import doctor
from difflm_jax.cli import difflm
from difflm_jax.config import recipes
from difflm_jax.config.files import load_config
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_every_check_that_is_not_ok_says_how_to_mend_it(capsys):
    assert difflm(["difflm", "doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert {"python", "jax", "devices", "memory", "disk", "hub cache", "hub", "wandb"} <= {c["name"] for c in checks}
    assert all(bool(check["fix"]) == (check["state"] != "ok") for check in checks)


def test_a_plugin_of_another_version_is_a_failure(monkeypatch):
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.9.0", "jax-cuda12-pjrt": "0.10.2"}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    states = {check.found: (check.state, bool(check.fix)) for check in doctor._packages()}
    assert states["jax-cuda12-plugin 0.9.0, but jaxlib 0.10.2"] == ("failure", True)
    assert states["jax-cuda12-pjrt 0.10.2"] == ("ok", False)


def test_a_hub_that_is_needed_and_does_not_answer_is_a_failure(monkeypatch):
    def refused(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    needed, not_needed = doctor._hub(needed=True), doctor._hub(needed=False)
    assert (needed.state, not_needed.state) == ("failure", "warning") and "HF_HUB_OFFLINE=1" in needed.fix


def test_a_directory_that_cannot_be_written_names_what_moves_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    check = doctor._disk("hub cache", tmp_path / "not" / "yet")
    assert (check.state, check.fix) == ("failure", "HF_HOME=DIR names another place")


def test_a_run_that_lacks_its_data_fails_and_one_that_fits_passes(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    run = ["difflm", "doctor", f"--config.model={model}", f"--config.output_dir={tmp_path}", "--config.batch_size=1"]
    assert difflm([*run, f"--config.dataset={tmp_path / 'none.jsonl'}"]) == 1
    shown = capsys.readouterr().out
    assert "failure  run" in shown and "fix: --config.model= and --config.dataset=" in shown
    assert "fit " in shown


def test_recipes_are_listed_shown_and_copied(tmp_path, capsys):
    assert difflm(["difflm", "recipes", "list"]) == 0
    assert re.search(r"^ *small_data +A few hundred rows of your own", capsys.readouterr().out, re.MULTILINE)
    assert difflm(["difflm", "recipes", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == (recipes.CONFIGS / "quickstart.py").read_text()
    copy = tmp_path / "mine.py"
    assert difflm(["difflm", "recipes", "copy", "small_data", str(copy)]) == 0
    assert load_config(str(copy)) == load_config(str(recipes.CONFIGS / "small_data.py"))
    assert difflm(["difflm", "recipes", "copy", "small_data", str(copy)]) == 1
    assert difflm(["difflm", "recipes", "show", "quikstart"]) == 1
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_init_writes_a_config_that_is_read_back_and_previewed(tmp_path, capsys):
    model, rows, made = save_tiny_model(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "made"
    rows.write_text("".join(f'{{"prompt": "{n} + 1", "response": "{n + 1}"}}\n' for n in range(12)))
    assert difflm(["difflm", "init", str(made), f"--model={model}", f"--data={rows}"]) == 0
    shown = capsys.readouterr()
    assert "rows.jsonl:" in shown.out and f"next: difflm train --config={made / 'config.py'}" in shown.err
    config = load_config(str(made / "config.py"))
    assert (config.model, config.dataset, config.output_dir) == (str(model), str(rows), str(made / "run"))
    assert not (made / "run").exists()
    assert difflm(["difflm", "init", str(made), f"--data={rows}"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert difflm(["difflm", "init", str(tmp_path / "other")]) == 1
    assert "--data=mine.jsonl" in capsys.readouterr().err
