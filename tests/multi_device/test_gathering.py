"""Transfers of the compiled step: packed weights of one layer at a time, inside the loops over layers."""

import json

import pytest

CODE = """
import json
import jax, optax
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import batch_sharding, place, place_rows
from difflm_jax.training.optimizer import clip_by_global_norm
from difflm_jax.training.step import TrainState, make_train_step
from tests.multi_device.same_numbers import micro_batched, setting

params, options, lora = setting("nf4", "qwen3")
mesh = make_mesh(1, 4, 2)
optimizer = optax.chain(clip_by_global_norm(1.0), optax.scale_by_adam())
step = make_train_step(options, optimizer, lambda index: 1e-2, mesh)
state = place(TrainState({"lora": lora}, optimizer.init({"lora": lora})), mesh)
frozen, rows = place({"params": params}, mesh), place_rows(micro_batched(2), batch_sharding(mesh))
arguments = (frozen, state, rows, jax.random.key(5), 0)
text = step.lower(*arguments).compile().as_text()
print(json.dumps(text))
"""


def computations(text: str) -> dict[str, list[str]]:
    """Returns {name of a computation: its instructions}; the entry is called "ENTRY"."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:
            name = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name:
            found[name].append(line.strip())
    return found


@pytest.fixture(scope="module")
def compiled(on_devices):
    """The text of the compiled step."""
    return json.loads(on_devices(8, CODE))


@pytest.mark.slow
def test_packed_weights_are_gathered_inside_the_loops_over_layers(compiled):
    """Every u8 all-gather is in a while body, once in the forward and once in the backward loop; no weight is moved
    dequantised, and never that of all layers at once."""
    parts = computations(compiled)
    gathers = {
        name: [line for line in lines if " all-gather(" in line or " all-gather-start(" in line]
        for name, lines in parts.items()
    }
    bodies = {
        word.split("=%")[1].rstrip(",") for lines in parts.values() for line in lines for word in line.split()
        if word.startswith("body=%")
    }  # fmt: skip
    packed = {
        name: [line for line in lines if "= u8[" in line or "= (u8[" in line]
        for name, lines in gathers.items()
        if any("= u8[" in line or "= (u8[" in line for line in lines)
    }
    assert packed and set(packed) <= bodies
    # seven projections, each with codes and the codes of its scales, forward and (recomputed) backward
    assert sorted(len(lines) for lines in packed.values()) == [14, 14], packed
    for lines in packed.values():
        assert not [line for line in lines if "u8[3," in line]  # never the stack of the three layers
        assert not [line for line in gathers[next(n for n in packed if packed[n] is lines)] if "= f32[" in line]
