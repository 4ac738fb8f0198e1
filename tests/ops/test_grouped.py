"""Matmuls of sorted rows with a weight per group, against one numpy matmul per group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.ops.grouped import grouped_matmul
from difflm_jax.quant import QuantConfig, dequantize, quantize

# Groups without rows, of one row, and longer than a block; rows after the last group, as of other devices' experts.
SIZES = ([5, 0, 1, 30, 0], [0, 0, 0, 0, 0], [40, 0, 0, 0, 0])
ROWS, OUT, IN = 40, 24, 32


def expected(rows, w, sizes):
    ends = np.cumsum(sizes)
    y = np.zeros((len(rows), w.shape[1]), np.float32)
    for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        y[end - size : end] = rows[end - size : end] @ w[group].T
    return y


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, IN)).astype(np.float32), rng.normal(size=(5, OUT, IN)).astype(np.float32)


@jax.jit
def product_and_gradients(rows, w, sizes, direction):
    """Returns the matmul with `w` and its gradient, next to a weight without a gradient."""
    (y, other), back = jax.vjp(lambda rows, w: grouped_matmul(rows, [w, 2 * jax.lax.stop_gradient(w)], sizes), rows, w)
    return y, other, *back([direction, direction])


def test_each_group_of_rows_has_its_own_weight_and_both_have_gradients(arrays):
    rows, w = arrays
    direction = np.random.default_rng(1).normal(size=(ROWS, OUT)).astype(np.float32)
    for sizes in SIZES:
        y, other, of_rows, of_w = product_and_gradients(rows, w, jnp.array(sizes), direction)
        np.testing.assert_allclose(y, expected(rows, w, sizes), atol=2e-5)
        np.testing.assert_allclose(other, 2 * y, atol=2e-5)
        np.testing.assert_allclose(of_rows, 3 * expected(direction, np.swapaxes(w, 1, 2), sizes), atol=6e-5)
        for group, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
            own = slice(end - size, end)
            np.testing.assert_allclose(of_w[group], direction[own].T @ rows[own], atol=2e-5)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_quantised_weights_are_decoded_group_by_group(arrays, form):
    rows, w = arrays
    stored = jax.vmap(lambda each: quantize(each, QuantConfig(form, 16)))(jnp.asarray(w))
    y = jax.jit(grouped_matmul)(rows, [stored], jnp.array(SIZES[0]))[0]
    np.testing.assert_allclose(y, expected(rows, np.asarray(dequantize(stored, jnp.float32)), SIZES[0]), atol=2e-5)
