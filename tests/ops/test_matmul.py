"""Matmuls sum in float32 and round once, forward and backward, for operands of any dtype."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.ops.matmul import matmul

ROWS, IN, OUT = 6, 512, 32


def operands():
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, ROWS // 2, IN), (OUT, IN)))


def exact(a, b):
    return jnp.asarray(np.asarray(a, np.float64) @ np.asarray(b, np.float64), jnp.bfloat16)


def test_a_bfloat16_product_and_its_gradient_are_rounded_once():
    """Bit for bit, except if float32 sums fall on the other side of a tie: one in a thousand, by one step."""
    x, w = operands()
    y, gradient_of = jax.vjp(lambda x: matmul(x, w), x)
    assert y.dtype == jnp.bfloat16 and y.shape == (2, ROWS // 2, OUT)
    ct = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.bfloat16)
    (gradient,) = gradient_of(ct)
    assert gradient.dtype == jnp.bfloat16
    for found, expected in ((y, exact(x, w.T)), (gradient, exact(ct, w))):
        found, expected = (np.asarray(a, np.float32) for a in (found, expected))
        assert (found == expected).mean() > 0.995
        np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-3)


def test_logits_are_not_rounded():
    x, w = operands()
    logits = matmul(x, w, jnp.float32)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T, rtol=1e-5, atol=1e-4)


def test_a_float32_master_gets_a_float32_gradient_from_bfloat16_activations():
    x, _ = operands()
    factor = jnp.asarray(np.random.default_rng(2).normal(size=(4, IN)), jnp.float32)
    y, gradient_of = jax.vjp(lambda factor: matmul(x, factor), factor)
    ct = jnp.asarray(np.random.default_rng(3).normal(size=y.shape), jnp.bfloat16)
    (gradient,) = gradient_of(ct)
    assert y.dtype == jnp.bfloat16 and gradient.dtype == jnp.float32
    expected = np.einsum("blr,bli->ri", np.asarray(ct, np.float64), np.asarray(x, np.float64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("platform", "asked"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")])
def test_only_the_platform_s_own_sum_is_compiled(platform, asked):
    """A CPU sums in float32 and rounds afterwards, in both passes. The program contains no other branch."""
    x, w = operands()
    gradient = jax.jit(jax.grad(lambda x: matmul(x, w).astype(jnp.float32).sum()))
    text = gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"dot_general.*-> tensor<\d+x\d+x(\w+)>", text)
    assert found and set(found) == {asked}
