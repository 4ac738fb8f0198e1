"""Speculative decoding, verification and regeneration over a mesh: the rows and tokens of one device."""

import pytest

from tests.tiny_run import make_model

CODE = """
import dataclasses
import jax, numpy as np
from pathlib import Path
import difflm_jax
from difflm_jax.data.chat import Encoded
from difflm_jax.data.examples import Example
from difflm_jax.data.tokenised import stored_rows
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import place
from difflm_jax.loading import ModelSpec, open_model
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.training.regeneration import regenerate

PROMPTS = [[5, 9, 200, 31, 7], [66], [12, 13, 12, 13, 12, 13, 12], [101, 102, 103], [50]]
CONFIG = LoraConfig(r=4)
mesh = make_mesh(2, 2, 2)


def pair(diffusion, mask_row=None):
    one = difflm_jax.load({model!r}, dtype="float32", **diffusion)
    lora = init_lora(jax.random.key(0), one.params, CONFIG, mask_row and one.params["embed_tokens"]["weight"][0])
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), lora)
    many = open_model(ModelSpec({model!r}, dtype="float32")).with_weights(mesh=mesh)
    many = dataclasses.replace(many, diffusion=one.diffusion)
    return one.with_adapter(lora, CONFIG), many.with_adapter(place(lora, mesh), CONFIG)


def same(one, many, **options):
    a, b = (lm.generate(PROMPTS, max_new_tokens=20, **options) for lm in (one, many))
    assert [x.tolist() for x in a.tokens] == [x.tolist() for x in b.tokens], options
    assert a.steps.tolist() == b.steps.tolist(), options
    return a


one, many = pair({{}})
gated = dict(algorithm="speculative", gated=True, noise="uniform", draft_length=2)
drafters = [lm.with_diffusion(attention="causal", logit_shift=True, **gated) for lm in (one, many)]
plain = same(*(lm.base() for lm in drafters))
for options in ({{"strategy": "tree"}}, {{}}, {{"temperature": 0.8, "lookup": False}}):
    found = same(*drafters, **options)
    if "temperature" not in options:
        assert [x.tolist() for x in found.tokens] == [x.tolist() for x in plain.tokens]
assert [x.tolist() for x in same(*pair({{"attention": "prefix"}}, True), verify="base").tokens] == [
    x.tolist() for x in plain.tokens
]

rows = stored_rows([Example(Encoded(np.array(row, np.int32), np.zeros(len(row), bool)), 0, "") for row in PROMPTS])
files = [Path({out!r}) / name for name in ("one", "many")]
for lm, file in zip(drafters, files):
    regenerate(rows, lm.base().decoder, file, 64, 12)
assert sorted(files[0].read_text().splitlines()) == sorted(files[1].read_text().splitlines())
print("same")
"""


@pytest.mark.slow
def test_a_mesh_gives_the_tokens_of_one_device(on_devices, tmp_path):
    """Plain, one pass and tree, drawn, drafted by diffusion, and regenerated answers, over data x fsdp x tensor."""
    code = CODE.format(model=str(make_model(tmp_path / "model")), out=str(tmp_path))
    assert on_devices(8, code).strip().endswith("same")
