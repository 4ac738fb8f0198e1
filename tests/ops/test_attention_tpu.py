"""Attention on TPUs: our kernels equal `attend`, skip tiles that no query sees, and are in a TPU's training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.config.files import load_config
from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.distributed.mesh import abstract_mesh, make_mesh
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.ops import attention_kernels, attention_tpu
from difflm_jax.ops.attention import attend
from difflm_jax.planning.jobs import training_job
from tests.tiny import HF, hidden_states, tiny_config, tiny_params

interpreted = functools.partial(attention_tpu.flash_attend, interpret=True)


@pytest.fixture
def a_small_tiles(monkeypatch):
    """Sets small tiles, so that short rows have several."""
    monkeypatch.setattr(attention_tpu, "_LARGEST_TILE", 128)


def arrays(queries: int, keys: int, dtype=jnp.float32):
    rng = np.random.default_rng(queries + keys)
    shapes = ((queries, 4), (keys, 2), (keys, 2))
    return [jnp.asarray(rng.normal(size=(2, length, heads, 8)), dtype) for length, heads in shapes]


def gradients(kernel, q, k, v, mask):
    """Returns (the sum of a function of all results, its gradients)."""
    total = jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(kernel(q, k, v, mask).astype(jnp.float32))), (0, 1, 2))
    return jax.jit(total)(q, k, v)


@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (40, 300)])
def test_it_is_the_same_attention(a_small_tiles, queries, keys):
    """Compares values and gradients for any lengths, with queries that see nothing."""
    q, k, v = arrays(queries, keys)
    mask = jnp.asarray(np.random.default_rng(0).random((2, queries, keys)) < 0.3).at[0, 5].set(False)
    np.testing.assert_allclose(interpreted(q, k, v, mask), attend(q, k, v, mask), atol=2e-6)
    found, expected = gradients(interpreted, q, k, v, mask), gradients(attend, q, k, v, mask)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_in_bfloat16_it_rounds_where_the_other_does(a_small_tiles):
    q, k, v = arrays(200, 200, jnp.bfloat16)
    mask = jnp.ones((2, 200, 200), bool)
    exact = gradients(attend, *(x.astype(jnp.float32) for x in (q, k, v)), mask)[1]
    found, expected = gradients(interpreted, q, k, v, mask)[1], gradients(attend, q, k, v, mask)[1]
    for a, b, right in zip(found, expected, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error, others = (np.abs(np.asarray(x, np.float32) - right).max() for x in (a, b))
        assert error <= 1.2 * others


def packed(rule: str, lengths: tuple[int, ...], prompt: int):
    """Returns the mask [1, T, T] of a row with examples of these lengths."""
    positions = jnp.concatenate([jnp.arange(length) for length in lengths])[None]
    segments = jnp.concatenate([jnp.full(length, i) for i, length in enumerate(lengths)])[None]
    prompts, valid = jnp.full_like(positions, prompt), jnp.ones_like(positions, bool)
    return DiffusionConfig(rule).view(Layout(positions, valid, prompts, segments)).mask


def test_tiles_that_nobody_sees_are_not_computed(a_small_tiles):
    """Keys that no query sees are NaN, which would show if they were multiplied by 0."""
    q, k, v = (x[:1] for x in arrays(384, 384))
    mask = packed("prefix", (128, 256), 100)
    spoilt_k, spoilt_v = (x.at[:, 128:].set(jnp.nan) for x in (k, v))
    found = interpreted(q, spoilt_k, spoilt_v, mask)[:, :128]
    np.testing.assert_allclose(found, attend(q, k, v, mask)[:, :128], atol=2e-6)
    first_half = jnp.arange(384)[:, None, None] < 128

    def total(kernel, k, v):
        return lambda q: jnp.sum(jnp.where(first_half, jnp.sin(kernel(q, k, v, mask)), 0))

    found = jax.grad(total(interpreted, spoilt_k, spoilt_v))(q)
    np.testing.assert_allclose(found[:, :128], jax.grad(total(attend, k, v))(q)[:, :128], atol=2e-5)


def test_in_the_model(monkeypatch):
    """Compares hidden states and adapter gradients, in the loop over layers and with saved activations."""
    config = tiny_config()
    params = tiny_params(config)
    lora = init_lora(jax.random.key(0), params, LoraConfig(r=2), jnp.ones(config.hidden_size))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 90, (2, 24)))
    valid = jnp.arange(24) < jnp.array([[24], [17]])

    def gradient(kernel):
        model = Transformer(config, LoraConfig(r=2), 96, remat="save_dots", attention_kernel=kernel)

        def total(lora):
            rows = (tokens, valid, jnp.array([6, 9]))
            return jnp.sum(hidden_states(model, DiffusionConfig("prefix"), {"params": params, "lora": lora}, *rows))

        return jax.jit(jax.value_and_grad(total))

    expected = gradient("xla")(lora)
    monkeypatch.setitem(attention_kernels.KERNELS, "pallas", lambda q, k, v, mask, lengths: interpreted(q, k, v, mask))
    for a, b in zip(jax.tree.leaves(gradient("pallas")(lora)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-4)


CONFIG = ("attention_kernel=pallas", "batch_size=2", "max_length=64", "gradient_accumulation_steps=1")


@pytest.mark.parametrize(
    ("key", "forward"),
    [("remat=none", 1), ("remat=save_attention", 1), ("remat=full", 2), ("batching=packed", 2)],
)
def test_the_training_step_of_a_tpu(key, forward):
    """Each layer has one call forward and one backward, and recomputes only if nothing is saved."""
    job = training_job(load_config("", [*CONFIG, key]), "pretrain", ModelConfig.from_hf(HF), make_mesh(1))
    program = job.trace().lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("@tpu_custom_call(") == forward + 1
    assert "2x4x64x64xf32" not in program and "2x2x64x2x64xf32" not in program  # scores


def test_it_is_in_the_step_of_every_mesh():
    config = load_config("", [*CONFIG, "batch_size=4"])
    job = training_job(config, "sft", ModelConfig.from_hf(HF), abstract_mesh(2, 2, 2))
    assert job.trace().lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call(") == 3


def test_rows_too_long_for_the_chip_are_refused():
    q = jax.ShapeDtypeStruct((1, 2**20, 4, 8), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 128, 2, 8), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 2**20, 128), jnp.bool_)
    with pytest.raises(UserError, match=r"'pallas': 1048576 tokens a row are more .* take attention_kernel=xla"):
        jax.eval_shape(lambda q, k, mask: jax.vjp(attention_tpu.flash_attend, q, k, k, mask)[0], q, k, mask)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_where_it_cannot_be_chosen(platform):
    attention_kernels.check_kernel("pallas", "float32", "tpu")
    with pytest.raises(UserError, match="attention_kernel='pallas' needs TPUs"):
        attention_kernels.check_kernel("pallas", "bfloat16", platform)
