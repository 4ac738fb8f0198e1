"""What the loop over layers reads in every layer: nothing of the size of the scores, of all heads or of a weight."""

import math

import jax
import pytest

from difflm_jax.config.files import load_config
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.models.config import ModelConfig
from difflm_jax.planning.jobs import training_job
from tests.tiny import HF

ROWS, LENGTH = 2, 16


@pytest.mark.parametrize(("held", "remat"), [("", "none"), ("nf4", "save_dots"), ("int4", "full")])
def test_no_large_constant_of_the_loop(held, remat):
    """jax takes out of a differentiated loop what follows from constants alone, and literals broadcast to arrays."""
    keys = [f"batch_size={ROWS}", f"max_length={LENGTH}", "gradient_accumulation_steps=1", "dtype=float32"]
    keys += [f"quantization={held}", f"remat={remat}", "quantization_block_size=16"]
    model_config = ModelConfig.from_hf(HF)
    job = training_job(load_config("", keys), "pretrain", model_config, make_mesh(1))
    loops = [loop for loop in scans(job.trace().jaxpr.jaxpr) if loop.params["length"] == model_config.num_layers]
    assert len(loops) == 2  # forward and backward
    for loop in loops:
        constants = [math.prod(var.aval.shape) for var in loop.invars[: loop.params["num_consts"]]]
        assert max(constants) <= ROWS * LENGTH * LENGTH  # the mask


def scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for value in jax.tree.leaves(eqn.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans(inner)
