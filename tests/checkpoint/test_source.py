"""Tests where a model comes from: paths, hub ids, the cache, and names that are none of these."""

import os

import pytest
from huggingface_hub.errors import HTTPError

from difflm_jax.checkpoint.hf import load_params
from difflm_jax.checkpoint.source import open_source
from difflm_jax.errors import UserError


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such directory or file"),
        ("~/nowhere-at-all", "no such directory or file"),
        ("~nobody-of-that-name/model", "no such directory or file"),
        ("/nowhere/at/all", "no such directory or file"),
        ("weights.gguf", "no such directory or file"),
        ("a/b/c", "no such directory or file"),
        (" ", "is empty"),
        (__file__, "neither a directory nor a .gguf file"),
        (os.path.dirname(__file__), "has no config.json"),  # noqa: PTH120
    ],
)
def test_what_is_not_a_model(source, message):
    with pytest.raises(UserError, match=message):
        open_source(source)


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a PEFT adapter"):
        open_source(str(tmp_path))


def test_a_revision_of_a_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="revision='main' goes with a hub id"):
        open_source(str(tmp_path), revision="main")


def test_an_unreachable_hub_names_the_local_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        open_source("nobody/nothing", revision="v1")
    for part in ("nobody/nothing at revision v1", "local directory", ".gguf", "cache"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_proxy_that_refuses_is_an_unreachable_hub(monkeypatch):
    def refused(*_, **__):
        raise HTTPError("403 Forbidden")

    monkeypatch.setattr("difflm_jax.checkpoint.source.snapshot_download", refused)
    with pytest.raises(UserError, match=r"nobody/nothing: not in the local cache .*403 Forbidden"):
        open_source("nobody/nothing")


def test_a_hub_model_in_the_cache_is_opened_without_a_network(tmp_path, tiny_model, assert_same_weights, monkeypatch):
    model = tiny_model("qwen3")
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "v1").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = open_source("someone/tiny", revision="v1")
    assert (source.name, source.revision) == ("someone/tiny", "v1")
    assert_same_weights(load_params(source, "float32"), model.state_dict())
