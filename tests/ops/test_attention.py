"""Attention and its gradient equal jax's own, for any number of queries at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.errors import UserError
from difflm_jax.models.transformer import REMAT
from difflm_jax.ops import attention
from difflm_jax.ops.attention import attend_beside
from difflm_jax.ops.attention_kernels import attend_with


def of_jax(q, k, v, mask):
    y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
    return jnp.where(mask.any(axis=-1)[..., None, None], y, 0)


@pytest.mark.parametrize("length", [17, 256, 257, 600])
def test_values_and_gradients_are_those_of_jax(length):
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    mask = jnp.asarray(rng.random((2, length, length)) < 0.5).at[0, 3].set(False)  # a query that sees nothing

    def total(attend):
        return lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v, mask)))

    found = jax.jit(jax.value_and_grad(total(attention.attend), argnums=(0, 1, 2)))(q, k, v)
    expected = jax.jit(jax.value_and_grad(total(of_jax), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_scores_of_all_queries_never_exist_at_once():
    """float32 scores of [2, 4, 1024, 1024] are 34 MB; softmax and gradients would take several times that."""
    q = k = v = jax.ShapeDtypeStruct((2, 1024, 4, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.bool_)

    def loss(q, k, v, mask):
        return attention.attend(q, k, v, mask).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, mask).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 50e6


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("save_dots", 1), ("save_attention", 1), ("full", 2)])
def test_a_backward_pass_that_keeps_the_result_does_not_attend_again(remat, times):
    """The largest score of a query is computed in the forward pass only."""
    q = k = v = jnp.ones((1, 8, 2, 4))
    mask = jnp.ones((1, 8, 8), bool)

    def loss(q):
        return jnp.sin(attention.attend(jnp.sin(q), k, v, mask)).sum()

    loss = jax.checkpoint(loss, policy=REMAT[remat], prevent_cse=False)
    assert str(jax.make_jaxpr(jax.grad(loss))(q)).count(" reduce_max[") == times


@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, True), (2.0, False)])
def test_rows_beside_columns_see_the_same_caps_and_sinks(softcap, has_sinks):
    """Compares with an explicit softmax that has the sinks as one more score per head."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for length, heads in ((5, 4), (9, 2), (9, 2)))
    sinks = rng.normal(size=4).astype(np.float32) if has_sinks else None
    mask = rng.random((2, 5, 9)) < 0.7
    scores = np.einsum("bthe,bshe->bhts", q, np.repeat(k, 2, axis=2)) * 8**-0.5
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    powers = np.exp(scores) * mask[:, None]
    total = powers.sum(axis=-1) + (0 if sinks is None else np.exp(sinks)[:, None])
    expected = np.einsum("bhts,bshe->bthe", powers / np.maximum(total, 1e-30)[..., None], np.repeat(v, 2, axis=2))
    whole = attend_with("xla", (q, k, v), mask, None, softcap, sinks)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    columns = tuple(np.swapaxes(x[:, :4], 1, 2) for x in (k, v))
    beside = attend_beside(q, columns, (k[:, 4:], v[:, 4:]), mask, softcap, sinks)
    np.testing.assert_allclose(beside, expected, atol=1e-5)


def test_a_kernel_that_cannot_cap_scores_is_refused():
    q, k = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 1, 8))
    with pytest.raises(UserError, match="attention_kernel='cudnn' cannot cap scores"):
        attend_with("cudnn", (q, k, k), jnp.ones((1, 2, 2), bool), None, 5.0)
