"""The command `plan`: its table, its JSON, every config of the project, and bad input."""

import json
import re
from pathlib import Path

import jax
import pytest

from difflm_jax import plan
from difflm_jax.planning.chips import GIB, apple_chip
from tests.tiny import HF
from tests.tiny_checkpoint import save_tiny_model

SMALL = {
    **HF, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def run(model, *more):
    return plan.command(["plan", f"--config.model={model}", "--config.max_length=128", *more])


def test_the_command_prints_a_line_a_function_chip_and_mesh(model, tmp_path, capsys):
    out = tmp_path / "plan.json"
    meshes = ["--mesh=1,1,1", "--mesh=2,2,2"]
    assert run(model, "--chips=v5e,h100", *meshes, "--steps=8", "--config.phases=sft", f"--out={out}") == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(sft|sampling) .* yes ", printed, re.M)) == 8
    assert max(map(len, printed.splitlines()[1:])) <= 100
    records = json.loads(out.read_text())
    assert {(r["function"], r["chip"], tuple(r["mesh"])) for r in records} == {
        (function, chip, mesh)
        for function in ("sft", "sampling")
        for chip in ("v5e", "h100")
        for mesh in ((1, 1, 1), (2, 2, 2))
    }
    for record in records:
        assert record["fits"] and record["seconds"] > 0
        assert record["total_gib"] == pytest.approx(sum(record["gib"].values()), abs=0.01)
        assert (record["link_gib"] > 0) == (record["mesh"] != [1, 1, 1])
        assert record["largest_batch_size"] >= 16
    assert run(model, "--chips=v5e", "--memory_share=0.001", "--what=train") == 0
    starved = re.findall(r"^(\w+) .*DOES NOT FIT +0 ", capsys.readouterr().out, re.M)
    assert starved == ["pretrain", "sft"]


CONFIGS = sorted(path.name for path in (Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_of_the_project_can_be_planned(name, capsys):
    """None ends in a traceback, and those of common models need no network."""
    config = Path(__file__).parents[1] / "configs" / name
    flags = ["--config.model=HuggingFaceTB/SmolLM2-135M-Instruct", "--config.dataset=rows.jsonl", "--config.phases=sft"]
    flags.append("--chips=m16")
    assert plan.command(["plan", f"--config={config}", *flags]) == 0
    assert re.search(r"^sampling +m16", capsys.readouterr().out, re.M)


def test_lengths_are_those_of_the_data_where_they_are_at_hand(tmp_path, capsys):
    """Short rows take less than rows of max_length, and the whole run is the sum of its steps."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    rows.write_text("".join(json.dumps({"messages": turns, "id": i}) + "\n" for i in range(40)))
    directory, out = save_tiny_model(tmp_path / "model"), tmp_path / "plan.json"
    keys = {"model": directory, "dataset": rows, "max_length": 256, "batch_size": 2, "test_size": 0, "phases": "sft"}
    keys |= {"gradient_accumulation_steps": 1, "epochs": 3, "length_multiple": 16, "cache_dir": tmp_path}
    flags = [*(f"--config.{key}={value}" for key, value in keys.items()), "--chips=h100", "--what=train"]

    def record(*more):
        assert plan.command(["plan", *flags, f"--out={out}", *more]) == 0
        return json.loads(out.read_text())[0]

    short, long = record(), record("--nolengths")
    assert short["steps"] == 60 and short["columns"] < 128
    assert short["seconds"] < long["seconds"] / 2
    assert short["run_seconds"] == pytest.approx(60 * short["seconds"], rel=0.01, abs=0.05)
    assert short["total_gib"] == long["total_gib"] and long["run_seconds"] is None
    assert f"rows of {short['columns']} tokens on average" in capsys.readouterr().out


def test_chips_of_newcomers():
    l4, m36 = plan._chip("l4", 0), plan._chip("m36", 0)
    assert 22 * GIB < l4.memory < 24 * GIB and l4.flops and l4.bandwidth
    assert (m36.memory, m36.platform) == (36 * GIB, "cpu") and apple_chip("m") is apple_chip("max") is None
    assert all(plan._chip(name, 0).memory < 25 * GIB for name in ("t4", "3090", "4090"))


def test_this_machine_and_its_compiler(model, capsys):
    """`--compile` on the device that is here, which is a CPU in the tests."""
    flags = ["--what=train", "--config.phases=sft", "--config.batch_size=2", "--config.dtype=float32"]
    assert run(model, "--chips=this", "--compile", *flags) == 0
    assert re.search(rf"^sft +{jax.default_backend()} ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--chips=v9"], "--chips=v9: is not one of"),
        (["--out=no/where.json"], "no/where.json: cannot be written"),
        (["--mesh=1,2"], "--mesh=1,2: must be three integers above 0"),
        (["--mesh=1,x,1"], "--mesh=1,x,1: must be three integers"),
        (["--mesh=1,1,3"], "mesh.tensor=3 does not divide the model's num_key_value_heads=4"),
        (["--mesh=3,1,1"], "batch_size=16 must be a multiple of mesh.data x mesh.fsdp = 3"),
        (["--peak_share=0"], "--peak_share must be in (0, 1]"),
        (["--config.model=./nowhere"], "nowhere"),
        (["--config.max_length=100000"], "max_position_embeddings"),
        (["--mesh=64,16,1", "--config.batch_size=1024", "--compile", "--chips=v5e"], "no slice of 1024 v5e chips"),
        (["--mesh=2,1,1", "--compile", "--chips=this"], "there are 1 devices here"),
        (["--compile", "--chips=l4"], "what XLA must know of l4 is not known"),
    ],
)
def test_bad_input_is_one_line(model, flags, named, capsys):
    assert run(model, *flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and named in error and "\n" not in error
