"""Clean copies that are kept: the losses of steps that compute them, and the same bits whatever is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from difflm_jax.data.fields import PlacedExample, empty_rows, put_example
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.lossless import Draft
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import batch_sharding, place, place_rows
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.training.clean_copies import CleanCopies
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from tests.tiny import tiny_config, tiny_params

ROWS, WIDTH, EXAMPLES = 8, 32, 12
DIFFUSION = DiffusionConfig("causal", 0, True, 96, gated=True, noise="uniform", draft_length=3)


def batch(order, width=WIDTH):
    """[1, ROWS, width]: the first rows hold two examples each, the others one."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 16, EXAMPLES)
    texts = [rng.integers(0, 96, n).astype(np.int32) for n in lengths]
    rows = empty_rows(ROWS, width)
    for number, id in enumerate(order):
        row, segment = (number // 2, number % 2 + 1) if number < 8 else (number - 4, 1)
        start = int(lengths[order[number - 1]]) if segment == 2 else 0
        example = PlacedExample(texts[id], np.arange(lengths[id]) >= 3, 3, segment, id, number / EXAMPLES)
        put_example(rows, row, slice(start, start + len(texts[id])), example, slice(None))
    return {name: field[None] for name, field in rows.items()}


def trainer(mesh_shape, draft):
    """Returns `train(gib) -> (loss of each step, what was trained, the copies)`; gib None: clean rows in the step."""
    config = tiny_config()
    lora_config, params, mesh = LoraConfig(r=4), tiny_params(config), make_mesh(*mesh_shape)
    options = StepOptions(Transformer(config, lora=lora_config), Corruption(DIFFUSION, "answer", draft=draft), 64)
    optimizer = optax.scale_by_adam()
    step = make_train_step(options, optimizer, lambda _: 1e-2, mesh)
    lora = jax.tree.map(lambda x: x + 0.05, init_lora(jax.random.key(1), params, lora_config, None))
    frozen = place({"params": params}, mesh)

    def train(gib):
        start = {"lora": jax.tree.map(jnp.copy, lora)}
        state = place(TrainState(start, optimizer.init(start)), mesh)
        copies = None if gib is None else CleanCopies(options, mesh, frozen, gib, 16)
        losses = []
        for number, fields in enumerate(EPOCHS):
            rows = CleanBatch(**fields) if copies is None else copies.added(fields)
            rows = place_rows(rows, batch_sharding(mesh))
            state, metrics = step(frozen, state, rows, jax.random.key(3), jnp.int32(number))
            losses.append(float(metrics["sums"].loss))
        return losses, jax.device_get(state.trained), copies

    return train


EPOCHS = [batch(np.arange(EXAMPLES)), batch(np.arange(EXAMPLES)[::-1], 48)]  # an example's place and width change


@pytest.mark.parametrize("settings", [{}, pytest.param({"loss": "kl"}, marks=pytest.mark.slow)], ids=str)
def test_losses_do_not_depend_on_what_is_kept(settings, monkeypatch):
    """Kept, computed again each time, kept in part: the same bits; and those of a step that runs its clean rows."""
    passes = []
    one_pass = CleanCopies._pass
    monkeypatch.setattr(CleanCopies, "_pass", lambda *given: passes.append(len(given[2])) or one_pass(*given))
    train = trainer((1, 1, 1), Draft(rows=3, curriculum=(3,), anchors=2, **settings))
    in_step, expected, _ = train(None)
    kept, found, copies = train(1.0)
    np.testing.assert_allclose(kept, in_step, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert sum(passes) == EXAMPLES  # each of them once
    for gib in (0.0, copies.bytes / 2**31):
        again, same, partly = train(gib)
        assert partly.bytes <= gib * 2**30 and sum(passes) > EXAMPLES
        assert again == kept
        jax.tree.map(np.testing.assert_array_equal, same, found)
