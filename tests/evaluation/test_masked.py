"""The evaluation of a split is one number, however its rows are batched."""

import jax
import pytest

from difflm_jax.config import default_config
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.evaluation.masked import Evaluator, summarise
from difflm_jax.training.loop import Phase, evaluation_record, make_evaluator
from difflm_jax.training.phase import PhaseData
from tests.data.test_batches import dataset_of
from tests.multi_device.same_numbers import rows_of_a_step, setting


def test_evaluation_does_not_depend_on_the_batch_size():
    params, options, lora = setting(None)
    variables = {"params": params, "lora": lora}
    rows, found = rows_of_a_step(), []
    for size in (16, 4):
        split = [{name: field[None, at : at + size] for name, field in rows.items()} for at in range(0, 16, size)]
        evaluate = Evaluator(options, make_mesh(1), split, jax.random.key(9))
        found.append(summarise(evaluate(variables)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_so_many_test_rows_are_evaluated_whatever_a_step_holds():
    params, options, lora = setting(None)
    texts = [list(range(3, 9 + i)) for i in range(7)]
    rows = dataset_of([(text, [i > 2 for i in range(len(text))]) for text in texts])

    def evaluated(eval_rows: int, batch_size: int) -> dict:
        config = default_config()
        config.update({"eval_rows": eval_rows, "batch_size": batch_size, "max_length": 32})
        data, diffusion = PhaseData("sft", config, rows, rows, 0, 1), options.corruption.diffusion
        phase = Phase(data, options.model, diffusion, {"params": params}, make_mesh(1))
        return evaluation_record(make_evaluator(phase, options), phase, {"lora": lora})

    assert evaluated(5, 2)["eval_masked_nll"] == pytest.approx(evaluated(5, 4)["eval_masked_nll"], rel=1e-5)
    assert evaluated(5, 2)["eval_masked_nll"] != evaluated(0, 2)["eval_masked_nll"]
