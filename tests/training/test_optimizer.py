"""AdamW and the schedules against torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from difflm_jax.config.files import load_config
from difflm_jax.errors import UserError
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer

_SCHEDULES = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}


def _config(**settings):
    return load_config(overrides=[f"{key}={value}" for key, value in settings.items()])


def _run_torch(config, start, gradients):
    """(parameters after every step, learning rate of every step) of torch's AdamW under transformers' schedule."""
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in start]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_b1, config.adam_b2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    schedule = _SCHEDULES[config.lr_schedule](optimizer, config.warmup_steps, len(gradients))
    steps, rates = [], []
    for gradient in gradients:
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = torch.tensor(value)
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        steps.append([parameter.detach().numpy().copy() for parameter in parameters])
    return steps, rates


def _run_ours(config, start, gradients):
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config, len(gradients))
    parameters = [jnp.asarray(value) for value in start]

    @jax.jit
    def step(parameters, state, gradient, index):
        updates, state = optimizer.update(gradient, state, parameters)
        rate = schedule(index)
        return jax.tree.map(lambda p, u: p - rate * u, parameters, updates), state, rate

    state, steps, rates = optimizer.init(parameters), [], []
    for index, gradient in enumerate(gradients):
        parameters, state, rate = step(parameters, state, gradient, index)
        steps.append(parameters)
        rates.append(float(rate))
    return steps, rates


def _problem(steps=20, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(4, 6), (6,)]
    start = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    # Small at first and large later, so that some are clipped and some are not.
    scales = np.geomspace(1e-3, 10, steps)
    return start, [[(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes] for scale in scales]


@pytest.mark.parametrize("lr_schedule", _SCHEDULES)
@pytest.mark.parametrize("settings", [{}, {"warmup_steps": 5, "weight_decay": 0.1}, {"max_grad_norm": 0}], ids=str)
def test_twenty_steps_equal_torch_and_transformers(lr_schedule, settings):
    config = _config(learning_rate=1e-2, lr_schedule=lr_schedule, **settings)
    start, gradients = _problem()
    expected_steps, expected_rates = _run_torch(config, start, gradients)
    steps, rates = _run_ours(config, start, gradients)
    np.testing.assert_allclose(rates, expected_rates, rtol=1e-5, atol=1e-9)
    for ours, theirs in zip(steps, expected_steps, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)
    assert max(np.abs(a - b).max() for a, b in zip(steps[-1], start, strict=True)) > 0.05  # it moved at all


def test_the_linear_schedule_is_the_original_one():
    schedule = learning_rate_schedule(_config(learning_rate=2e-4), 100)
    assert [float(schedule(k)) for k in (0, 50, 99)] == pytest.approx([2e-4, 1e-4, 2e-6], rel=1e-4)


def test_a_second_phase_keeps_the_moments_and_restarts_the_schedule():
    config = _config()
    optimizer = make_optimizer(config)
    parameters = {"a": jnp.ones(3)}
    _, state = optimizer.update({"a": jnp.full(3, 0.1)}, optimizer.init(parameters), parameters)
    _, state = optimizer.update({"a": jnp.full(3, 0.1)}, state, parameters)
    again = make_optimizer(config)  # what the next phase makes
    assert jax.tree.structure(again.init(parameters)) == jax.tree.structure(state)
    updates, state = again.update({"a": jnp.zeros(3)}, state, parameters)
    # Bias-corrected Adam after gradients 0.1, 0.1, 0: the moments of the first two are still there.
    mu, nu = 0.1 * 0.1 * (0.9**2 + 0.9), 0.1**2 * 0.001 * (0.999**2 + 0.999)
    expected = mu / (1 - 0.9**3) / (np.sqrt(nu / (1 - 0.999**3)) + 1e-8)
    np.testing.assert_allclose(updates["a"], expected, rtol=1e-4)
    assert float(learning_rate_schedule(config, 50)(0)) == pytest.approx(config.learning_rate)


def test_moments_are_float32_and_only_of_what_is_trained():
    lora = {"lora_A": jnp.ones((2, 3)), "mask_row": jnp.ones(4)}
    state = make_optimizer(_config()).init(lora)
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), adam.mu) == {
        "lora_A": ((2, 3), "float32"),
        "mask_row": ((4,), "float32"),
    }


def test_a_warm_up_longer_than_the_phase_is_refused():
    with pytest.raises(UserError, match="warmup_steps=11: the phase has only 10 steps"):
        learning_rate_schedule(_config(warmup_steps=11), 10)
