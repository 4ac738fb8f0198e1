"""Weights load from a file directly onto their shards, and equal those on one device."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny_run import make_model

CODE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import difflm_jax
from difflm_jax.checkpoint.hf import load_params
from difflm_jax.checkpoint.source import open_source
from difflm_jax.loading import ModelSpec, open_model
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import place
from difflm_jax.quant import QuantConfig

source = open_source({model!r})
mesh = make_mesh(2, 2, 2)
for held in (None, QuantConfig("nf4", block_size=16), QuantConfig("int8", block_size=16)):
    plain = load_params(source, jnp.float32, held)
    found, expected = load_params(source, jnp.float32, held, mesh), place(plain, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim), name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
        if "_proj" in name and a.ndim == 3 and not name.endswith(".scales.codes"):  # a quarter on each device
            assert a.addressable_shards[0].data.size * 4 == a.size, name
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(plain)))

tokens = np.arange(60).reshape(3, 20) % 250
one = difflm_jax.load({model!r}, dtype="float32")
many = open_model(ModelSpec({model!r}, dtype="float32")).with_weights(mesh=mesh)
np.testing.assert_allclose(np.asarray(many(tokens)), np.asarray(one(tokens)), atol=2e-4)
asked = dict(max_new_tokens=8, steps=4, batch_size=3)
assert one.generate(["1+1", "2"], **asked).texts == many.generate(["1+1", "2"], **asked).texts

config = LoraConfig(r=4)
lora = init_lora(jax.random.key(0), one.params, config, jnp.ones(one.config.hidden_size))
lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora)
for held in (None, "nf4"):
    held = held and QuantConfig(held, block_size=16)
    one = difflm_jax.load({model!r}, dtype="float32", quantization=held).with_adapter(lora, config)
    many = open_model(ModelSpec({model!r}, dtype="float32", quantization=held)).with_weights(mesh=mesh)
    merged = many.with_adapter(place(lora, mesh), config).merge()
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(merged.params), jax.tree.leaves(many.params)):
        if held is None:  # the sums lie where the weights did
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), jax.tree_util.keystr(path)
    one.merge().save_pretrained({out!r} + f"/one-{{held}}")
    merged.save_pretrained({out!r} + f"/many-{{held}}")
"""


@pytest.mark.slow
def test_sharded_weights_are_those_of_one_device(on_devices, tmp_path):
    """Dense, NF4 and int8 from one file, on 1 device and on 2 x 2 x 2: equal bits, a part on each; equal answers. And
    an adapter merged there is written as it is from one device, without the padding of the tables."""
    model = make_model(tmp_path / "model", vocab_size=266)  # which four devices do not divide
    on_devices(8, CODE.format(model=str(Path(model)), out=str(tmp_path)))
    written = sorted(path.name for path in tmp_path.glob("one-*"))
    assert len(written) == 2
    for directory in written:
        expected = load_file(tmp_path / directory / "model.safetensors")
        found = load_file(tmp_path / directory.replace("one-", "many-", 1) / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-6, err_msg=name)
