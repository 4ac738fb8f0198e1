"""Tests exports to the hub: one-line refusals, figures in the hub's format, and the upload."""

import json

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl

from difflm_jax.checkpoint import hub
from difflm_jax.cli import difflm
from difflm_jax.errors import UserError
from tests.test_lm import randomly_adapted
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture
def account(monkeypatch):
    """Sets a token and replaces `HfApi` with one that records its calls."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    asked = []

    def create_repo(self, repo_id, **options):
        asked.append(("create", repo_id, options))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        asked.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return asked


def test_an_export_is_uploaded_after_it_is_written(account, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    randomly_adapted(model, "full", False).save_adapter(tmp_path / "adapter")
    words = [f"--model={model}", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]
    assert difflm(["difflm", "export", *words, "--push_to_hub=us/model", "--private"]) == 0
    assert account[0] == ("create", "us/model", {"private": True, "exist_ok": True})
    assert account[1][:2] == ("upload", "us/model") and "adapter_model.safetensors" in account[1][2]
    assert "uploaded to https://huggingface.co/us/model" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == str(model)


def test_figures_of_a_run_are_in_the_card_as_the_hub_reads_them(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: some/base\ntags: [masked-diffusion]\n---\n\n# A model\n")
    record = {"phase": "sft", "step": 40, "eval_loss": 1.25, "masked_nll": 2.5, "masked_accuracy": None}
    hub.add_figures(tmp_path, "us/rows", record)
    card = ModelCard.load(tmp_path / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"eval_loss": 1.25, "masked_nll": 2.5}
    assert card.data.base_model == "some/base" and "step 40 of sft" in card.text and "# A model" in card.text


def test_without_a_token_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    words = ["--model=nowhere", "--adapter=nothing", f"--out={tmp_path / 'out'}", "--push_to_hub=us/model"]
    assert difflm(["difflm", "export", *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --push_to_hub=us/model: no token") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_uploaded_is_one_line(account, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--push_to_hub=a/b/c"):
        hub.check_push("a/b/c")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.check_push("us/model")

    def refused(self, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(HfApi, "upload_folder", refused)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=f"no route.*hf upload us/model {tmp_path}") as error:
        hub.push(tmp_path, "us/model", private=False)
    assert "\n" not in str(error.value)
