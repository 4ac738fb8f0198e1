"""Fused attention: same results as `attend`, its program for a GPU, and unsupported cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.config.files import load_config
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.ops import attention_kernels
from difflm_jax.ops.attention import attend
from difflm_jax.planning.jobs import training_job
from tests.tiny import HF


@pytest.fixture
def a_cudnn(monkeypatch):
    """Pretends that NVIDIA's library is installed, which is enough to trace and to lower."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(("queries", "keys"), [(6, 8), (7, 7), (5, 8)])
def test_what_is_given_to_it_makes_the_same_attention(monkeypatch, queries, keys):
    """Uses jax's attention instead of the kernel: padding to even lengths changes no value and no gradient."""
    of_jax, lengths = jax.nn.dot_product_attention, []

    def in_its_place(q, k, v, mask, implementation):
        assert implementation == "cudnn"
        lengths.append((q.shape[1], k.shape[1]))
        return of_jax(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    rng = np.random.default_rng(queries)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, h, 8)), jnp.float32) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
    mask = jnp.asarray(rng.random((2, queries, keys)) < 0.5).at[:, :, 0].set(True)
    assert_same(q, k, v, mask, None, jnp.ones((2, queries), bool))
    assert not any(queries % 2 or keys % 2 for queries, keys in lengths)


def test_rows_of_known_lengths_need_no_mask(monkeypatch):
    """This includes a row without real tokens, whose values nothing reads."""
    of_jax = jax.nn.dot_product_attention

    def in_its_place(*arrays, implementation, query_seq_lengths, key_value_seq_lengths):
        lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
        return of_jax(*arrays, **lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    rng, lengths = np.random.default_rng(0), jnp.array([7, 4, 0])
    q, k, v = (jnp.asarray(rng.normal(size=(3, 7, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    real = jnp.arange(7) < lengths[:, None]
    assert_same(q, k, v, jnp.broadcast_to(real[:, None], (3, 7, 7)), lengths, real)


def assert_same(q, k, v, mask, lengths, real_BT):
    """Asserts that values and gradients of real queries equal those of `attend`."""

    def total(kernel):
        return lambda q, k, v: jnp.sum(jnp.where(real_BT[..., None, None], jnp.sin(kernel(q, k, v)), 0))

    def fused(q, k, v):
        return attention_kernels.attend_in_cudnn(q, k, v, mask, lengths)

    found = jax.value_and_grad(total(fused), argnums=(0, 1, 2))(q, k, v)
    expected = jax.value_and_grad(total(lambda q, k, v: attend(q, k, v, mask)), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


CONFIG = ("attention_kernel=cudnn", "batch_size=2", "max_length=64", "gradient_accumulation_steps=1")


@pytest.mark.parametrize(
    ("key", "forward", "name"),
    [
        ("remat=none", 1, "Softmax"),
        ("remat=save_attention", 1, "Softmax"),
        ("remat=save_dots", 1, "Softmax"),
        ("remat=full", 2, "Softmax"),
        ("batching=packed", 2, "ScaleBiasSoftmax"),
        ("attention=prefix", 2, "ScaleBiasSoftmax"),
        ("anneal_steps=9", 2, "ScaleBiasSoftmax"),
    ],
)
def test_the_training_step_of_a_gpu(a_cudnn, key, forward, name):
    """Each layer has one call forward and one backward, and recomputes only if nothing is saved.

    The call has a mask only if the lengths of rows are not enough.
    """
    config = load_config("", [*CONFIG, key])
    job = training_job(config, "pretrain", ModelConfig.from_hf(HF), make_mesh(1))
    program = job.trace().lower(lowering_platforms=("cuda",)).as_text()
    assert program.count(f"@__cudnn$fmha{name}(") == forward
    assert program.count(f"@__cudnn$fmha{name}Backward(") == 1
    assert program.count("@__cudnn$") == forward + 1
    assert "2x4x64x64xf32" not in program and "2x2x64x2x64xf32" not in program  # scores


def test_without_the_library_it_says_so():
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(UserError, match="attention_kernel='cudnn': cuDNN is not detected"):
        attention_kernels.attend_in_cudnn(q, q, q, jnp.ones((1, 4, 4), bool), None)


@pytest.mark.parametrize(
    ("dtype", "platform", "message"), [("bfloat16", "cpu", "NVIDIA"), ("float32", "gpu", "bfloat16")]
)
def test_where_it_cannot_be_chosen(dtype, platform, message):
    attention_kernels.check_kernel("xla", dtype, platform)
    attention_kernels.check_kernel("cudnn", "bfloat16", "gpu")
    with pytest.raises(UserError, match=message):
        attention_kernels.check_kernel("cudnn", dtype, platform)
