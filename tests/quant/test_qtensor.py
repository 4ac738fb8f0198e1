"""Tests the quantised weight as a pytree: packing, size, errors, the matmul and its gradient, slices in a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difflm_jax.errors import UserError
from difflm_jax.ops.matmul import matmul
from difflm_jax.quant import FORMATS, NestedScales, QuantConfig, dequantize, quantize
from difflm_jax.quant.qtensor import pack, unpack

CONFIGS = [
    QuantConfig("nf4"),
    QuantConfig("nf4", 128, double_quant=False),
    QuantConfig("int4"),
    QuantConfig("int8", 32),
]


def weight(out_dim: int = 48, in_dim: int = 256) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(out_dim, in_dim)), jnp.float32)


def test_packing_holds_halves_of_a_group_in_one_byte():
    codes = jnp.arange(32, dtype=jnp.uint8).reshape(1, 2, 16) % 16
    packed = pack(codes)
    assert packed.shape == (1, 16)
    assert packed[0, 0] == 0 | (8 << 4)
    np.testing.assert_array_equal(unpack(packed, 16), codes)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shape_block_and_size(config):
    w = quantize(weight(512, 1024), config)
    assert (w.shape, w.block_size) == ((512, 1024), config.block_size)
    bits = {"nf4": 4.127 if config.double_quant else 4.25, "int4": 4.25, "int8": 8.5}[config.format]
    assert 8 * w.nbytes / (512 * 1024) == pytest.approx(bits, abs=0.02)
    if not isinstance(w.scales, NestedScales):  # a shard is a weight too, with its own shape
        assert jax.tree.map(lambda leaf: leaf[:256], w).shape == (256, 1024)


@pytest.mark.parametrize(
    ("config", "rms"),
    [(QuantConfig("nf4"), 0.092), (QuantConfig("int4"), 0.095), (QuantConfig("int8"), 0.006)],
    ids=lambda value: getattr(value, "format", ""),
)
def test_errors_on_normal_numbers(config, rms):
    x = weight(1024, 4096)
    error = np.asarray(dequantize(quantize(x, config), jnp.float32) - x)
    assert np.sqrt((error**2).mean()) == pytest.approx(rms, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64),
    kind=st.sampled_from(sorted(FORMATS)),
)
def test_no_value_is_further_off_than_its_format_allows(values, kind):
    """The bound is half the widest gap between levels, plus the error of a scale in bfloat16 or 8 bits."""
    x = jnp.asarray([values], jnp.float32)
    off = np.abs(np.asarray(dequantize(quantize(x, QuantConfig(kind, double_quant=False)), jnp.float32) - x))
    # int4: the end opposite to the largest value is clipped at 7/8
    allowed = {"nf4": 0.152, "int4": 1 / 8 + 1 / 256, "int8": 0.5 / 127 + 1 / 256}[kind]
    assert off.max() <= allowed * np.abs(values).max() + 1e-30


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(UserError, match="does not divide the 96 input features"):
        quantize(weight(8, 96), QuantConfig("int4", 64))
    for size in (0, 48, 8192, True, "64"):
        with pytest.raises(UserError, match="quantization_block_size"):
            QuantConfig("nf4", size)
    with pytest.raises(UserError, match="quantization='fp4'"):
        QuantConfig("fp4")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_dense_weight(config, dtype):
    w = quantize(weight(), config)
    dense = dequantize(w, dtype)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 256)), dtype)

    def total(x, w):
        return jnp.sum(jnp.sin(matmul(x, w).astype(jnp.float32)))

    np.testing.assert_array_equal(matmul(x, w), matmul(x, dense))
    gradient, expected = jax.jit(jax.grad(total))(x, w), jax.jit(jax.grad(total))(x, dense)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(gradient, np.float32), np.asarray(expected, np.float32), rtol=1e-5 if dtype == jnp.float32 else 2e-2,
        atol=1e-5 if dtype == jnp.float32 else 1e-1,
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_stack_is_dequantised_layer_by_layer_and_sliced_by_a_scan(config):
    layers = [quantize(weight() * (i + 1), config) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stack.shape == (3, 48, 256)
    dense = np.asarray(dequantize(stack, jnp.float32))
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(dense[i], dequantize(layer, jnp.float32))
    x = jnp.ones((4, 256))
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, matmul(x, layer)), 0, stack)
    np.testing.assert_allclose(scanned[2], matmul(x, layers[2]), rtol=1e-6)


@pytest.mark.usefixtures("optimised")
def test_a_backward_pass_without_remat_keeps_no_dense_weights():
    """Residuals grow with the activations of a layer, not with its dense weight (256 KB)."""

    def temporaries(layers: int) -> int:
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), quantize(weight(256, 256), QuantConfig("nf4")))

        def loss(x, stack):
            y, _ = jax.lax.scan(lambda carry, layer: (jnp.tanh(matmul(carry, layer)), None), x, stack)
            return y.sum()

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((2, 256)), stack).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert (temporaries(40) - temporaries(8)) / 32 < 16_000
