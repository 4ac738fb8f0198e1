"""The same losses, gradients and adapters on every mesh, and for any number of micro-batches."""

import json

import numpy as np
import pytest

from tests.multi_device.same_numbers import gradient, numbers

# Together they have every mesh and every kind of numbers: a cell a program, not the product of both.
CASES = [
    {"micro_batches": 4, "mesh": [1, 1, 1], "evaluated": False},
    {"micro_batches": 2, "mesh": [8, 1, 1]},
    {"micro_batches": 1, "mesh": [1, 8, 1]},
    {"quantization": "nf4", "micro_batches": 2, "mesh": [2, 2, 2]},
    {"quantization": "int8", "micro_batches": 4, "mesh": [1, 4, 2], "evaluated": False},
    {"objective": "distillation", "micro_batches": 2, "mesh": [2, 2, 2], "evaluated": False},
    {"objective": "complementary", "micro_batches": 2, "mesh": [2, 1, 2], "evaluated": False},
    {"objective": "draft", "micro_batches": 2, "mesh": [2, 2, 2]},
    {"trained": "all", "micro_batches": 2, "mesh": [2, 2, 2], "evaluated": False},
    {"family": "olmo2", "trained": "all", "micro_batches": 2, "mesh": [2, 2, 2], "evaluated": False},
    {"family": "granite_swa", "micro_batches": 2, "mesh": [1, 2, 2], "evaluated": False},
    {"family": "gemma2", "micro_batches": 2, "mesh": [2, 2, 2], "evaluated": False},
    {"family": "gemma4_text", "micro_batches": 2, "mesh": [2, 2, 2], "evaluated": False},
    {"family": "cohere", "micro_batches": 2, "mesh": [1, 1, 2], "evaluated": False},
    {"family": "qwen2_moe", "quantization": "nf4", "micro_batches": 2, "mesh": [2, 2, 2]},
    {"family": "qwen2_moe", "trained": "all", "micro_batches": 2, "mesh": [1, 4, 2], "evaluated": False},
]


def kind(case: dict) -> tuple:
    """Returns the settings that the numbers of a case depend on."""
    return (
        case.get("quantization"),
        case.get("objective", "plain"),
        case.get("trained", "adapter"),
        case.get("family", "qwen3"),
    )


@pytest.fixture(scope="module")
def one_device():
    """{(format of the base, objective, what is trained, family): numbers on a single device}."""
    wanted = {}
    for case in CASES:
        wanted[kind(case)] = wanted.get(kind(case), False) or case.get("evaluated", True)
    return {each: numbers(1, [1, 1, 1], each[0], scored, *each[1:]) for each, scored in wanted.items()}


@pytest.mark.slow
def test_every_mesh_gives_the_numbers_of_one_device(on_devices, one_device):
    """Plain, over a quantised base, of other objectives, training every weight, of other families; dropout is on."""
    code = (
        "import json; from tests.multi_device.same_numbers import numbers;"
        f"print(json.dumps([numbers(**case) for case in {CASES!r}]))"
    )
    for case, found in zip(CASES, json.loads(on_devices(8, code)), strict=True):
        expected = one_device[kind(case)]
        # A gradient summed once too often over 8 devices would be 8 times too large, whatever the loss says.
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-4, err_msg=str(case))
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5, err_msg=str(case))
        if case.get("evaluated", True):
            assert found["evaluation"].keys() == expected["evaluation"].keys()
        for name, value in found["evaluation"].items():
            assert value == pytest.approx(expected["evaluation"][name], rel=1e-5), case
        for name, value in expected["trained"].items():
            assert found["trained"][name] == pytest.approx(value, rel=1e-4), (case, name)


def furthest(found: dict[str, list], expected: dict[str, list]) -> float:
    """Returns the largest difference of a leaf, relative to its largest value."""
    pairs = [(np.asarray(found[name]), np.asarray(value)) for name, value in expected.items()]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.slow
def test_a_mesh_moves_a_saturated_model_as_the_last_bit_of_its_weights_does(on_devices):
    """Granite's default multiplier makes of random weights scores in the hundreds, and a layer has no RoPE.

    Its gradient is that of one device up to rounding, which four steps of Adam then magnify: hence the smaller
    multiplier above. One bit of every weight is the measure of what rounding does.
    """
    code = (
        "import json; from tests.multi_device.same_numbers import gradient;"
        "print(json.dumps(gradient('saturated', [1, 2, 2])))"
    )
    on_mesh = json.loads(on_devices(4, code))
    expected = gradient("saturated", [1, 1, 1])
    by_a_bit = furthest(gradient("saturated", [1, 1, 1], 2**-23), expected)
    assert 0 < furthest(on_mesh, expected) <= 4 * by_a_bit < 1e-3
