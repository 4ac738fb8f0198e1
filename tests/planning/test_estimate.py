"""Tests estimates of memory, FLOPs and traffic against XLA's buffers on a CPU and against the formulas."""

import math

import pytest

from difflm_jax.config.files import load_config, lora_config
from difflm_jax.distributed.mesh import abstract_mesh, make_mesh
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.flops import Work, train_flops
from difflm_jax.planning.estimate import Step, argument_parts, largest_batch, sampling_estimate, work_of_rows
from difflm_jax.planning.jobs import Generation, compiled_parts, sampling_job, training_job
from tests.tiny import HF

SMALL = {
    **HF, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024,
}  # fmt: skip
SHAPE = ("dtype=float32", "batch_size=8", "max_length=128", "gradient_accumulation_steps=2")
TOLERANCE = 0.15  # of everything
CASES = {
    "full remat": (),
    "save_dots": ("remat=save_dots",),
    "nf4, no dropout": ("quantization=nf4", "lora_config.lora_dropout=0"),
    "bfloat16": ("dtype=bfloat16",),
    "every weight": ("trained=all",),
}
ONE = (1, 1, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("case", CASES)
def test_memory_of_a_step_is_what_xla_assigns(case):
    """Compiled steps on one CPU device: arguments to the byte, except unread ones; the total to 15 %."""
    config, model_config = load_config("", [*SHAPE, *CASES[case]]), ModelConfig.from_hf(SMALL)
    measured, _ = compiled_parts(training_job(config, "pretrain", model_config, make_mesh(1), on_cpu=True))
    found = Step.of(config, "pretrain", model_config, ONE).estimate("cpu", config.batch_size)
    arguments = sum(found.parts[name] for name in ("weights", "adapters", "moments", "batch"))
    assert 0 <= arguments - measured["arguments"] < found.parts["batch"]  # fields that the objective does not read
    assert found.total == pytest.approx(measured["arguments"] + measured["temporaries"], rel=TOLERANCE), found.parts


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("keys", [("quantization=nf4",), ("dtype=bfloat16", "attention=prefix")])
def test_memory_of_a_generation_is_what_xla_assigns(keys):
    """The total to 15 %, on one CPU device."""
    config, model_config = load_config("", [*SHAPE, *keys]), ModelConfig.from_hf(SMALL)
    generation = Generation(16, 64, 64, 16)
    measured, _ = compiled_parts(sampling_job(config, model_config, make_mesh(1), generation, on_cpu=True))
    job = sampling_job(config, model_config, abstract_mesh(*ONE), generation)
    found = sampling_estimate(config, model_config, ONE, "cpu", job)
    assert found.total == pytest.approx(measured["arguments"] + measured["temporaries"], rel=TOLERANCE), found.parts


def test_the_options_of_a_sampler_may_be_python_numbers():
    """Regression: `algorithm=steady` has a threshold, a float among the sized arguments: `plan` had a traceback."""
    config = load_config("", [*SHAPE, "algorithm=steady", "attention=prefix"])
    job = sampling_job(config, ModelConfig.from_hf(SMALL), abstract_mesh(*ONE), Generation(4, 16, 16, 4))
    assert argument_parts(job)["batch"] > 0


def test_a_mesh_divides_what_it_says():
    """Four devices along `fsdp`: a quarter of the weights and whole moments; gathered bytes grow with the layers."""
    config, shape = load_config("", [*SHAPE, "quantization=nf4"]), ModelConfig.from_hf(SMALL)
    deeper = ModelConfig.from_hf({**SMALL, "num_hidden_layers": 16})
    whole, part, deep = (
        Step.of(config, "pretrain", each, sizes).estimate("cuda", 8)
        for each, sizes in ((shape, ONE), (shape, (1, 4, 1)), (deeper, (1, 4, 1)))
    )
    assert whole.link_bytes == 0
    assert part.parts["weights"] == pytest.approx(whole.parts["weights"] / 4, rel=0.1)
    assert part.parts["moments"] == whole.parts["moments"]
    assert part.parts["activations"] == pytest.approx(whole.parts["activations"] / 4, rel=0.01)
    assert part.flops == pytest.approx(whole.flops / 4)  # all matmuls with gathered weights are recomputed
    matrices = ((256, 256), (128, 256), (128, 256), (256, 256), *[(768, 256)] * 3)
    packed = sum(map(math.prod, matrices)) / 2
    passes = 2 * config.gradient_accumulation_steps  # forward, and again for the backward pass
    # and once a step the sum over devices of the gradients of eight layers' factors, twice 3/4 of their bytes in a ring
    factors = 4 * 16 * sum(map(sum, matrices))
    expected = 8 * (passes * packed * 3 / 4 + 2 * factors * 3 / 4)
    assert deep.link_bytes - part.link_bytes == pytest.approx(expected, rel=0.1)


def test_heads_and_mlp_are_divided_over_tensor():
    config, model_config = load_config("", [*SHAPE, "remat=save_dots"]), ModelConfig.from_hf(SMALL)
    one, two = (Step.of(config, "pretrain", model_config, sizes).estimate("tpu", 8).parts for sizes in (ONE, (1, 1, 2)))
    assert two["weights"] == pytest.approx(one["weights"] / 2, rel=0.01)
    assert one["activations"] / 2 < two["activations"] < one["activations"]  # each device has whole hidden states


def test_a_step_counts_what_its_objective_computes():
    """Blocks compute a noisy and a clean copy of each row; complementary masks use each row twice."""
    config, model_config = load_config("", SHAPE), ModelConfig.from_hf(SMALL)
    found = Step.of(config, "pretrain", model_config, ONE).estimate("cuda", 8, 100)
    once = train_flops(model_config, lora_config(config), Work(8 * 100, 8 * 100**2, 8 * 100), "full")
    assert found.flops == pytest.approx(2 * once)  # two micro-batches
    blocks = load_config("", [*SHAPE, "attention=block", "block_length=16"])
    assert work_of_rows(blocks, 8, 100) == Work(8 * 200, 8 * 200**2, 8 * 100)
    pairs = load_config("", [*SHAPE, "complementary_masks=true", "loss_tokens=masked"])
    assert work_of_rows(pairs, 8, 100) == Work(16 * 100, 16 * 100**2, 16 * 100)


@pytest.mark.parametrize("capacity", [0, 99, 100, 1234, 10**9])
def test_the_largest_batch(capacity):
    def total(rows):
        return 92 + 2 * rows + (40 if rows > 200 else 0)

    allowed = [rows for rows in range(4, 4097, 4) if total(rows) <= capacity]
    assert largest_batch(total, capacity, unit=4) == max(allowed, default=0)
