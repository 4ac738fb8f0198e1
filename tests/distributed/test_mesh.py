"""How arrays lie on a mesh, and what does not divide; numbers on real meshes are tested in tests/multi_device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from difflm_jax.distributed.mesh import by_one_process, check_model, make_mesh, rows_of_process, specs
from difflm_jax.errors import UserError
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.planning.jobs import abstract_mesh
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
    assert found.scales.codes == P(None, "fsdp", None)  # nested scales are whole along `tensor`
    assert found.scales.absmax == found.scales.offset == P()


def test_an_axis_of_one_device_divides_nothing():
    params = tiny_params(tiny_config())
    assert set(jax.tree.leaves(specs(params, abstract_mesh(8, 1, 1)))) == {P()}
    found = specs(params, abstract_mesh(2, 4, 1))
    assert found["layers"]["self_attn"]["q_proj"]["weight"] == P(None, "fsdp", None)
    assert found["layers"]["mlp"]["down_proj"]["weight"] == P(None, "fsdp", None)
    assert found["embed_tokens"]["weight"] == P("fsdp", None)


def test_a_mesh_that_is_too_large_or_not_told_is_refused():
    with pytest.raises(UserError, match=r"mesh.data=1000, .*: there are \d+ devices"):
        make_mesh(1000)
    with pytest.raises(UserError, match=r"only one of them can be what is left \(-1\)"):
        make_mesh(-1, -1)
    mesh = make_mesh(1)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    np.testing.assert_array_equal(rows_of_process(mesh, 6), np.arange(6))


@pytest.mark.parametrize(
    ("sizes", "block_size", "message"),
    [
        ({"tensor": 4}, 1, "mesh.tensor=4 does not divide the model's num_key_value_heads=2"),
        ({"fsdp": 7}, 1, "mesh.fsdp=7 does not divide the 64 outputs that a device has of q_proj"),
        ({"tensor": 2}, 16, "mesh.tensor=2 does not divide the 3 blocks of 16 inputs of down_proj"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_by_name(sizes, block_size, message):
    @dataclasses.dataclass
    class Shaped:
        shape: dict

    with pytest.raises(UserError, match=message):
        check_model(tiny_config(), block_size, Shaped({"data": 1, "fsdp": 1, "tensor": 1, **sizes}))


def test_without_a_mesh_the_model_is_whole():
    from difflm_jax.distributed.collectives import everywhere, gathered, lookup, summed

    x = jnp.arange(6.0).reshape(2, 3)
    for function in (gathered, summed, everywhere):
        assert function(x) is x
    np.testing.assert_array_equal(lookup(x, jnp.array([[1, 0]])), x[jnp.array([[1, 0]])])


@pytest.mark.parametrize("index", [0, 1])
def test_a_write_that_fails_in_one_process_fails_in_all(monkeypatch, index):
    def write():
        raise UserError("out: no space left")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda here: np.array([False, True]))
    with pytest.raises(UserError, match=["no space left", "out: process 0 could not write it"][index]):
        by_one_process(write, "out")
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda here: np.array([True, True]))
    written = []
    by_one_process(lambda: written.append(index), "out")
    assert written == ([0] if index == 0 else [])
