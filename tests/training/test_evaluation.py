"""The evaluation of a split is one number, however its rows are batched."""

import jax
import pytest

from difflm_jax.mesh import make_mesh
from difflm_jax.training.evaluation import Evaluator, summarise
from tests.multi_device.same_numbers import rows_of_a_step, setting


def test_evaluation_does_not_depend_on_the_batch_size():
    params, options, lora = setting(None)
    variables = {"params": params, "lora": lora}
    rows, found = rows_of_a_step(), []
    for size in (16, 4):
        split = [{name: field[None, at : at + size] for name, field in rows.items()} for at in range(0, 16, size)]
        evaluate = Evaluator(options, make_mesh(1), split, 16, jax.random.key(9))
        found.append(summarise(evaluate(variables)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
