"""The chunked cross-entropy against the whole softmax, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.ops.cross_entropy import Outputs, Teacher, scored_cross_entropy

POSITIONS, WIDTH, VOCABULARY, FORBIDDEN = 23, 8, 37, 5


def inputs(scored_share: float):
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.5, 3.0, POSITIONS) * (rng.random(POSITIONS) < scored_share)
    targets = rng.integers(6, VOCABULARY, POSITIONS)
    hidden, head = rng.normal(size=(POSITIONS, WIDTH)), rng.normal(size=(VOCABULARY, WIDTH))
    return [jnp.asarray(x, jnp.float32) for x in (hidden, head)] + [
        jnp.asarray(targets),
        jnp.asarray(weights, "float32"),
    ]


def whole(hidden, head, targets, weights):
    logits = (hidden @ head.T).at[:, FORBIDDEN].set(-jnp.inf)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    correct, confidence = logits.argmax(1) == targets, log_p.max(1)
    return (weights * nll).sum(), *(x * (weights > 0) for x in (nll, correct, confidence))


@pytest.mark.parametrize("chunk", [1, 4, 23, 64])
@pytest.mark.parametrize("scored", [0.0, 0.3, 1.0])
def test_value_and_gradient_equal_the_whole_softmax(chunk, scored):
    hidden, head, targets, weights = inputs(scored)
    loss, scores = scored_cross_entropy(hidden, head, targets, weights, Outputs(FORBIDDEN), chunk)
    assert not scores.divergence.any()
    for a, b in zip((loss, *scores[:3]), whole(hidden, head, targets, weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)

    def loss_of(hidden, head):
        return 2.5 * scored_cross_entropy(hidden, head, targets, weights, Outputs(FORBIDDEN), chunk)[0]

    expected = jax.grad(lambda *of: 2.5 * whole(*of, targets, weights)[0], argnums=(0, 1))(hidden, head)
    with_a_trained_head = jax.grad(loss_of, argnums=(0, 1))(hidden, head)
    all_found = (*with_a_trained_head, jax.grad(loss_of)(hidden, head))
    for found, gradient in zip(all_found, (*expected, expected[0]), strict=True):
        np.testing.assert_allclose(found, gradient, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [4, 64])
def test_distillation_adds_the_divergence_from_the_teacher_and_its_gradient(chunk):
    """KL(teacher || model) over the vocabulary without the mask token, against `jax.scipy` and automatic gradients."""
    hidden, head, targets, weights = inputs(0.6)
    rng = np.random.default_rng(1)
    taught = jnp.asarray(rng.normal(size=hidden.shape), jnp.float32)
    teacher = Teacher(taught, jnp.asarray(rng.uniform(0.2, 2.0, POSITIONS), jnp.float32) * (weights > 0.9))

    def expected(hidden):
        allowed = jnp.delete(head, FORBIDDEN, axis=0)
        q, p = jax.nn.softmax(taught @ allowed.T), jax.nn.softmax(hidden @ allowed.T)
        divergence = jax.scipy.special.kl_div(q, p).sum(axis=1)
        return whole(hidden, head, targets, weights)[0] + (teacher.weights * divergence).sum(), divergence

    def got(hidden):
        return scored_cross_entropy(hidden, head, targets, weights, Outputs(FORBIDDEN), chunk, teacher=teacher)

    (loss, divergence), (own, scores) = expected(hidden), got(hidden)
    np.testing.assert_allclose(own, loss, rtol=2e-5)
    np.testing.assert_allclose(scores.divergence, divergence * (weights > 0), rtol=2e-4, atol=2e-5)
    gradient = jax.grad(lambda h: 2.5 * got(h)[0])(hidden)
    np.testing.assert_allclose(gradient, jax.grad(lambda h: 2.5 * expected(h)[0])(hidden), rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("optimised")
def test_logits_of_all_positions_never_exist():
    hidden, head = jnp.zeros((4096, WIDTH)), jnp.zeros((5003, WIDTH))
    targets, weights = jnp.zeros(4096, jnp.int32), jnp.ones(4096)
    compiled = (
        jax.jit(jax.grad(lambda h: scored_cross_entropy(h, head, targets, weights, Outputs(FORBIDDEN), 64)[0]))
        .lower(hidden)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 5003 * 4 / 10
    assert "4096,5003" not in compiled.as_text()
