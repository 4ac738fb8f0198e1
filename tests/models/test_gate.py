"""The gate of the adapter: base rows and draft rows in one forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.models.attention import View
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from tests.tiny import tiny_config, tiny_params

LENGTH = 12


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    params = tiny_params(config)
    lora_config = LoraConfig(r=4)
    lora = init_lora(jax.random.key(0), params, lora_config, None)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora)
    return Transformer(config, lora=lora_config), {"params": params, "lora": lora}


def rows(columns: int = 0):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, LENGTH)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    causal = positions[:, None, :] <= positions[:, :, None]
    return tokens, positions, causal


def apply(model, variables, tokens, positions, mask, **more):
    keys = jnp.broadcast_to(jnp.arange(mask.shape[2]), mask.shape[::2])
    return model.apply(variables, tokens, positions, View(mask, positions, keys), **more)


def test_a_closed_gate_is_the_base_to_the_bit(model, optimised):
    model, variables = model
    base = apply(model.clone(lora=None), {"params": variables["params"]}, *rows())
    closed = apply(model, variables, *rows(), gate_BT=jnp.zeros((2, LENGTH), bool))
    assert np.array_equal(base, closed)
    opened = apply(model, variables, *rows(), gate_BT=jnp.ones((2, LENGTH), bool))
    assert np.array_equal(opened, apply(model, variables, *rows()))
    assert not np.allclose(base, opened)


def test_base_rows_do_not_notice_draft_rows_in_their_pass(model, optimised):
    """Under a causal mask draft rows come last; earlier rows equal the base's bit for bit."""
    model, variables = model
    base = apply(model.clone(lora=None), {"params": variables["params"]}, *rows())
    gate = jnp.broadcast_to(jnp.arange(LENGTH) >= 8, (2, LENGTH))
    mixed = apply(model, variables, *rows(), gate_BT=gate)
    assert np.array_equal(base[:, :8], mixed[:, :8])
    assert not np.allclose(base[:, 8:], mixed[:, 8:])


def test_rows_beside_columns_are_the_rows_of_one_pass(model):
    """Columns come from an earlier pass, as many as each row has. Later ones are not seen."""
    model, variables = model
    tokens, positions, causal = rows()
    gate = jnp.broadcast_to(jnp.arange(LENGTH) >= 9, (2, LENGTH))
    whole = apply(model, variables, tokens, positions, causal, gate_BT=gate)
    known = 7
    _, kept = apply(model, variables, tokens, positions, causal, gate_BT=jnp.zeros((2, LENGTH), bool), mutable=["rows"])
    columns = jax.tree.map(lambda x: x.at[..., known:, :].set(1e4), kept["rows"])
    seen = jnp.broadcast_to(jnp.arange(LENGTH) < known, (2, LENGTH - known, LENGTH))
    mask = jnp.concatenate([seen, causal[:, known:, known:]], axis=2)
    beside = apply(
        model,
        {**variables, "columns": columns},
        tokens[:, known:],
        positions[:, known:],
        mask,
        gate_BT=gate[:, known:],
    )
    np.testing.assert_allclose(beside, whole[:, known:], rtol=2e-5, atol=2e-5)
