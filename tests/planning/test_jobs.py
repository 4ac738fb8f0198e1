"""The fit estimator: memory against what XLA assigns on a CPU, products against the formula, and its command."""

import dataclasses
import json
import math
import re

import jax
import pytest

from difflm_jax import plan
from difflm_jax.config.files import load_config, lora_config
from difflm_jax.distributed.mesh import abstract_mesh, make_mesh
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.flops import train_flops_per_token
from difflm_jax.planning.jobs import compiled_parts, estimate, largest_batch, sampling_job, training_job
from tests.tiny import HF

SMALL = {
    **HF, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024,
}  # fmt: skip
SHAPE = ("dtype=float32", "batch_size=8", "max_length=128", "gradient_accumulation_steps=2")
TOLERANCE = 0.25  # of the temporaries
CASES = {
    "full remat": (),
    "no remat": ("remat=none",),
    "nf4, no dropout": ("quantization=nf4", "lora_config.lora_dropout=0"),
    "bfloat16": ("dtype=bfloat16",),
    "every weight": ("trained=all",),
    "prefix, masked tokens scored": ("attention=prefix", "logit_shift=true", "loss_tokens=masked"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "sampling"])
def test_memory_is_what_xla_assigns(case):
    """Arguments but for what is not read, temporaries to 25 %, of compiled steps and a generation on one CPU device."""
    config = load_config("", [*SHAPE, *CASES.get(case, ())])
    model_config, mesh = ModelConfig.from_hf(SMALL), make_mesh(1)
    if case == "sampling":
        job = sampling_job(config, model_config, mesh, 8, 64, 64, 16, on_cpu=True)
    else:
        job = training_job(config, "pretrain", model_config, mesh, on_cpu=True)
    measured, _ = compiled_parts(job)
    found = estimate(job, mesh, model_config.num_layers, on_cpu=True).parts
    arguments = sum(found[name] for name in ("weights", "adapters", "moments", "batch") if name in found)
    unread = arguments - measured["arguments"]  # fields of the batch that the objective does not ask for
    assert 0 <= unread < found.get("batch", 4096)
    temporaries = found["activations"] + found["gradients"] + found["working"]
    assert temporaries == pytest.approx(measured["temporaries"], rel=TOLERANCE), (found, measured)


@pytest.mark.parametrize(("remat", "trained"), [("none", "adapter"), ("full", "adapter"), ("none", "all")])
def test_products_are_those_of_the_formula(remat, trained):
    config = load_config("", [*SHAPE, f"remat={remat}", f"trained={trained}", "lora_config.lora_dropout=0"])
    model_config, mesh = ModelConfig.from_hf(SMALL), abstract_mesh(1, 1, 1)
    found = estimate(training_job(config, "pretrain", model_config, mesh), mesh, model_config.num_layers)
    tokens = config.batch_size * config.gradient_accumulation_steps * config.max_length
    lora = lora_config(config) if trained == "adapter" else None
    expected = tokens * train_flops_per_token(model_config, config.max_length, lora, remat)
    if remat == "full":  # the formula has it made again, but nothing in the backward pass reads a layer's last product
        rank = lora.r
        last = model_config.intermediate_size * model_config.hidden_size + rank * model_config.hidden_size
        expected -= 2 * tokens * model_config.num_layers * last
    assert found.flops == pytest.approx(expected, rel=0.02)


def test_a_mesh_divides_what_it_says():
    """Four devices along `fsdp`: a quarter of the weights, moments whole; what is gathered grows with the layers."""
    config = load_config("", [*SHAPE, "quantization=nf4"])
    one, four = abstract_mesh(1, 1, 1), abstract_mesh(1, 4, 1)
    model_config = ModelConfig.from_hf(SMALL)
    deeper = dataclasses.replace(model_config, num_layers=16)
    whole, part, deep = (
        estimate(training_job(config, "pretrain", shape, mesh), mesh, shape.num_layers)
        for shape, mesh in ((model_config, one), (model_config, four), (deeper, four))
    )
    assert whole.link_bytes == 0
    assert part.parts["weights"] == pytest.approx(whole.parts["weights"] / 4, rel=0.1)
    assert part.parts["moments"] == whole.parts["moments"]
    assert part.flops == pytest.approx(whole.flops / 4, rel=0.1)  # products of gathered weights are all made again
    gathered = {each.link_bytes for each in (part, deep)}
    packed = sum(math.prod(shape) for shape in ((256, 256), (128, 256), (128, 256), (256, 256), *[(768, 256)] * 3)) / 2
    passes = 2 * config.gradient_accumulation_steps  # forward, and again for the backward pass
    # and once a step the sum over devices of the gradients of eight layers' factors, twice 3/4 of their bytes in a ring
    factors = 4 * 16 * sum(map(sum, ((256, 256), (128, 256), (128, 256), (256, 256), *[(768, 256)] * 3)))
    expected = 8 * (passes * packed * 3 / 4 + 2 * factors * 3 / 4)
    assert max(gathered) - min(gathered) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("capacity", [0, 99, 100, 1234, 10**9])
def test_the_largest_batch(capacity):
    calls = []

    def total(rows):
        calls.append(rows)
        return 92 + 2 * rows + (40 if rows > 200 else 0)

    found = largest_batch(total, capacity, unit=4)
    allowed = [rows for rows in range(4, 4097, 4) if total(rows) <= capacity]
    assert found == max(allowed, default=0)
    assert len(set(calls)) >= 1 and len(calls) - 1024 < 12


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
    assert printed.count("largest batch_size") == 8
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
    starved = re.findall(r"^(\w+) .*DOES NOT FIT, largest batch_size 0", capsys.readouterr().out, re.M)
    assert starved == ["pretrain", "sft"]


def test_this_machine_and_its_compiler(model, capsys):
    """`--compile` on the device that is here, which is a CPU in the tests."""
    flags = ["--what=train", "--config.phases=sft", "--config.batch_size=2", "--config.dtype=float32"]
    assert run(model, "--chips=this", "--compile", *flags) == 0
    assert f"sft       {jax.default_backend()}" in capsys.readouterr().out


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
    ],
)
def test_bad_input_is_one_line(model, flags, named, capsys):
    assert run(model, *flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and named in error and "\n" not in error
