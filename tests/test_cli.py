"""Code shared by the commands."""

import dataclasses
import importlib

import pytest
from absl import flags

from difflm_jax.cli import COMMANDS, PATH_FLAGS, run_command
from difflm_jax.sampling.options import Sampling

# Flags with text that names no file; those of decoding are not listed.
TEXTS = {
    *(field.name for field in dataclasses.fields(Sampling)),
    "prompt", "stop", "revision", "mask_token", "mesh", "hyper_parameters_json", "coordinator_address", "to", "dtype",
    "quantization", "chips", "tokens_per_pass", "host", "api_key", "chat_template", "columns", "roles", "regex",
    "push_to_hub",
}  # fmt: skip


def test_a_tilde_in_a_path_flag_is_the_home_directory_and_in_a_prompt_is_not(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/somebody")
    seen, values = {}, flags.FlagValues()
    for name in ("out", "prompt"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    flags.DEFINE_list("run", [], "", flag_values=values)
    command = ["plot", "--out=~/a.png", "--run=~/b,c", "--prompt=~ is a tilde"]
    assert run_command(lambda given: seen.update(given.flag_values_dict()), values, "", command) == 0
    assert (seen["out"], seen["run"]) == ("/home/somebody/a.png", ["/home/somebody/b", "c"])
    assert seen["prompt"] == "~ is a tilde"
    assert run_command(lambda _: None, values, "", ["plot", "--out=~nobody_here/a.png"]) == 1
    assert capsys.readouterr().err == "error: --out=~nobody_here/a.png: there is no such home directory\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "harness"])
def test_every_flag_with_text_is_known_to_be_a_path_or_not(name):
    found = importlib.import_module(f"difflm_jax.{name}").FLAGS
    own = [found[flag] for flag in found if found[flag].flag_type() in ("string", "comma separated list of strings")]
    assert [flag.name for flag in own if flag.name not in {*PATH_FLAGS, *TEXTS}] == []
