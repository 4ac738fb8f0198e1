"""Tests NF4 codes, scales and values against bitsandbytes on a CPU, and the error bounds of its own tests."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from difflm_jax.checkpoint.gguf.weights import open_gguf
from difflm_jax.quant import NestedScales, QTensor, QuantConfig, dequantize, nested, nf4, quantize
from difflm_jax.quant.qtensor import pack, unpack

pytestmark = pytest.mark.usefixtures("optimised")  # compilers may fuse operations and skip a rounding

# block size -> (mean absolute, mean relative error) of N(0, 1), from tests/test_functional.py of bitsandbytes
ERRORS = {
    64: (0.072796, 0.203353),
    128: (0.076839, 0.215258),
    256: (0.080322, 0.226056),
    512: (0.083535, 0.236123),
    1024: (0.086603, 0.245910),
    2048: (0.089605, 0.255750),
    4096: (0.092545, 0.265715),
}


def bnb_codes(packed: torch.Tensor) -> np.ndarray:
    """Returns bitsandbytes' codes, unpacked, in row-major order."""
    packed = packed.numpy().reshape(-1)
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)


def nested_bnb(weight: np.ndarray):
    """Returns bitsandbytes' (packed codes, state) with double quantisation."""
    return bnb.quantize_4bit(torch.tensor(weight), blocksize=64, compress_statistics=True, quant_type="nf4")


def our_codes(w: QTensor) -> np.ndarray:
    return np.asarray(unpack(w.codes, w.block_size)).reshape(-1)


def random_weights():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        shape = (int(rng.integers(3, 120)), 64 * int(rng.integers(1, 9)))
        yield (rng.standard_t(4, size=shape) * np.exp(2 * rng.normal())).astype(np.float32)


def smollm2_weights(path):
    _, files, _ = open_gguf(path)
    for layer in (0, 17):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            yield np.asarray(files.read(f"model.layers.{layer}.{module}.weight"), np.float32)


def check_against_bitsandbytes(weight: np.ndarray) -> None:
    quantised = jax.jit(quantize, static_argnums=1)(weight, QuantConfig("nf4", 64, double_quant=False))
    packed, state = bnb.quantize_4bit(torch.tensor(weight), blocksize=64, quant_type="nf4")
    np.testing.assert_array_equal(our_codes(quantised), bnb_codes(packed))
    np.testing.assert_array_equal(np.asarray(quantised.scales).reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(
        np.asarray(dequantize(quantised, jnp.float32)), bnb.dequantize_4bit(packed, state).numpy()
    )


def test_codes_scales_and_values_are_those_of_bitsandbytes():
    for weight in random_weights():
        check_against_bitsandbytes(weight)


@pytest.mark.parametrize("smallest", [0.0, 1e-39])
@pytest.mark.parametrize("double_quant", [False, True])
def test_an_all_zero_block_stays_zero(smallest, double_quant):
    """Its code is that of level zero, as in bitsandbytes. A guard below the smallest normal number would be flushed."""
    weight = np.full((8, 64), smallest, np.float32)
    found = jax.jit(quantize, static_argnums=1)(weight, QuantConfig("nf4", 64, double_quant))
    assert set(our_codes(found)) == {7}
    np.testing.assert_array_equal(np.asarray(dequantize(found, jnp.float32)), 0.0)
    packed, _ = bnb.quantize_4bit(torch.zeros(8, 64), blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    assert set(packed.numpy().reshape(-1)) == {0x77}


def test_zero_blocks_and_ties():
    weight = np.zeros((4, 128), np.float32)
    weight[1:] = np.random.default_rng(0).normal(size=(3, 128))
    weight[2, 0], weight[2, 1:16] = 1.0, (nf4.LEVELS[1:] + nf4.LEVELS[:-1]) / 2  # at midpoints, the lower level wins
    weight[2, 16:64] = 0.5
    check_against_bitsandbytes(weight)


def test_codes_of_real_weights_are_those_of_bitsandbytes(smollm2):
    for weight in smollm2_weights(smollm2):
        check_against_bitsandbytes(weight)


@pytest.mark.parametrize("block_size", ERRORS)
def test_errors_on_normal_numbers_are_those_of_bitsandbytes(block_size):
    x = np.random.default_rng(0).normal(size=(1024, 1024 * 4)).astype(np.float32)
    codes, scales = nf4.encode(x.reshape(-1, block_size))
    error = np.abs(np.asarray(nf4.decode(codes) * scales[:, None]).reshape(x.shape) - x)
    absolute, relative = ERRORS[block_size]
    assert error.mean() < absolute * 1.002
    assert (error / (np.abs(x) + 1e-8)).mean() < relative * 1.02


def test_the_dynamic_map_is_bit_for_bit_that_of_bitsandbytes():
    np.testing.assert_array_equal(nested.dynamic_map(), bnb.create_dynamic_map().numpy())


def test_double_quantised_scales():
    """bitsandbytes' CPU search is approximate: if a code differs, the value is within 1e-5 of a threshold."""
    code_map = nested.dynamic_map()
    differing = total = 0
    for weight in random_weights():
        found = jax.jit(quantize, static_argnums=1)(weight, QuantConfig("nf4")).scales
        _, state = nested_bnb(weight)
        absmax = np.abs(weight.reshape(-1, 64)).max(axis=1)
        np.testing.assert_allclose(float(found.offset), state.offset.item(), rtol=1e-6)  # sums in other orders
        np.testing.assert_allclose(np.asarray(found.absmax), state.state2.absmax.numpy(), rtol=1e-5, atol=1e-6)
        ours, theirs = np.asarray(found.codes).reshape(-1), state.absmax.numpy()
        where = np.flatnonzero(ours != theirs)
        limits = np.repeat(np.asarray(found.absmax), nested.BLOCK)[: len(absmax)]
        between = (code_map[ours[where]] + code_map[theirs[where]]) / 2
        normalised = (absmax - float(found.offset))[where] / limits[where]
        np.testing.assert_allclose(normalised, between, atol=1e-5)
        differing, total = differing + len(where), total + len(ours)
    assert differing < 0.005 * total


def test_values_of_a_double_quantised_weight_are_those_of_bitsandbytes():
    for weight in random_weights():
        packed, state = nested_bnb(weight)
        codes = jnp.asarray(bnb_codes(packed).reshape(weight.shape[0], -1, 64))
        scales = NestedScales(
            codes=jnp.asarray(state.absmax.numpy().reshape(weight.shape[0], -1)),
            absmax=jnp.asarray(state.state2.absmax.numpy()),
            offset=jnp.asarray(state.offset.numpy()),
            code_map=jnp.asarray(state.state2.code.numpy()),
        )
        values = jax.jit(dequantize, static_argnums=1)(QTensor(pack(codes), scales, "nf4"), jnp.float32)
        np.testing.assert_array_equal(np.asarray(values), bnb.dequantize_4bit(packed, state).numpy())
