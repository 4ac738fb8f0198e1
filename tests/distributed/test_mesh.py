"""Tests which meshes are built and which are refused. tests/multi_device tests results on real meshes."""

import dataclasses
import itertools

import numpy as np
import pytest

from difflm_jax.distributed.mesh import by_links, check_model, make_mesh
from difflm_jax.distributed.sharding import rows_of_process
from difflm_jax.errors import UserError
from tests.tiny import tiny_config


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip of a TPU slice, as jax describes it."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 2), (2, 2, 4), (16, 1, 1)])
def test_devices_that_talk_most_are_neighbours_of_a_tpu_slice(shape):
    """On 4x4 chips, even if the shape splits an axis of the slice, which `jax.make_mesh` refuses."""
    chips = [Chip(x + 4 * y, (x, y, 0)) for y in range(4) for x in range(4)]
    found = by_links(chips, shape)
    assert found.shape == shape and {chip.id for chip in found.flat} == set(range(16))
    for row in found.reshape(-1, shape[-1]):
        for one, other in itertools.pairwise(row):
            assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


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
