"""The chunked cross-entropy against the whole softmax, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.cross_entropy import scored_cross_entropy

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
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return (weights * nll).sum(), nll * (weights > 0), (logits.argmax(1) == targets) * (weights > 0)


@pytest.mark.parametrize("chunk", [1, 4, 23, 64])
@pytest.mark.parametrize("scored", [0.0, 0.3, 1.0])
def test_value_and_gradient_equal_the_whole_softmax(chunk, scored):
    hidden, head, targets, weights = inputs(scored)
    got = scored_cross_entropy(hidden, head, targets, weights, FORBIDDEN, chunk)
    for a, b in zip(got, whole(hidden, head, targets, weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    gradient = jax.grad(lambda h: 2.5 * scored_cross_entropy(h, head, targets, weights, FORBIDDEN, chunk)[0])(hidden)
    expected = jax.grad(lambda h: 2.5 * whole(h, head, targets, weights)[0])(hidden)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("optimised")
def test_logits_of_all_positions_never_exist():
    hidden, head = jnp.zeros((4096, WIDTH)), jnp.zeros((5003, WIDTH))
    targets, weights = jnp.zeros(4096, jnp.int32), jnp.ones(4096)
    compiled = (
        jax.jit(jax.grad(lambda h: scored_cross_entropy(h, head, targets, weights, FORBIDDEN, 64)[0]))
        .lower(hidden)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 5003 * 4 / 10
    assert "4096,5003" not in compiled.as_text()
