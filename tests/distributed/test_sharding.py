"""Tests how every kind of leaf is divided over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from difflm_jax.distributed.collectives import everywhere, gathered, lookup, summed
from difflm_jax.distributed.mesh import abstract_mesh
from difflm_jax.distributed.sharding import specs
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.quant import QuantConfig, quantize
from tests.tiny import tiny_config, tiny_params


def test_specs_of_every_kind_of_leaf():
    config = tiny_config()
    params = tiny_params(config)
    mesh = abstract_mesh(2, 2, 2)
    found = specs(params, mesh)
    layer = found["layers"]
    assert layer["self_attn"]["q_proj"]["weight"] == P(None, ("tensor", "fsdp"), None)
    assert layer["mlp"]["down_proj"]["weight"] == P(None, "fsdp", "tensor")
    assert layer["input_layernorm"]["weight"] == layer["self_attn"]["q_norm"]["weight"] == P()
    assert found["embed_tokens"]["weight"] == P(("fsdp", "tensor"), None)
    lora = init_lora(jax.random.key(0), params, LoraConfig(r=2), params["embed_tokens"]["weight"][0])
    found = specs({"mu": lora}, mesh)["mu"]["layers"]["mlp"]
    assert found["up_proj"] == {"lora_A": P(), "lora_B": P(None, "tensor", None)}
    assert found["down_proj"] == {"lora_A": P(None, None, "tensor"), "lora_B": P()}
    weight = jax.vmap(lambda w: quantize(w, QuantConfig("nf4", 16)))(params["layers"]["mlp"]["up_proj"]["weight"])
    found = specs({"layers": {"mlp": {"up_proj": {"weight": weight}}}}, mesh)["layers"]["mlp"]["up_proj"]["weight"]
    assert found.codes == P(None, ("tensor", "fsdp"), None)
    assert found.scales.codes == P(None, "fsdp", None)  # nested scales are not divided over `tensor`
    assert found.scales.absmax == found.scales.offset == P()


def test_an_axis_of_one_device_divides_nothing():
    params = tiny_params(tiny_config())
    assert set(jax.tree.leaves(specs(params, abstract_mesh(8, 1, 1)))) == {P()}
    found = specs(params, abstract_mesh(2, 4, 1))
    assert found["layers"]["self_attn"]["q_proj"]["weight"] == P(None, "fsdp", None)
    assert found["layers"]["mlp"]["down_proj"]["weight"] == P(None, "fsdp", None)
    assert found["embed_tokens"]["weight"] == P("fsdp", None)


def test_without_a_mesh_the_model_is_whole():
    x = jnp.arange(6.0).reshape(2, 3)
    for function in (gathered, summed, everywhere):
        assert function(x) is x
    np.testing.assert_array_equal(lookup(x, jnp.array([[1, 0]])), x[jnp.array([[1, 0]])])
