"""The same losses, gradients and adapters on every mesh, and for any number of micro-batches."""

import json

import numpy as np
import pytest

ONE = {"micro_batches": 1, "mesh": [1, 1, 1]}
CASES = [
    {"micro_batches": 4, "mesh": [1, 1, 1]},
    {"micro_batches": 2, "mesh": [8, 1, 1]},
    {"micro_batches": 1, "mesh": [1, 8, 1]},
    {"micro_batches": 2, "mesh": [2, 1, 2]},
    {"micro_batches": 2, "mesh": [2, 2, 2]},
    {"micro_batches": 4, "mesh": [1, 4, 2]},
]
QUANTISED = [
    {"quantization": "nf4", "micro_batches": 2, "mesh": [2, 2, 2]},
    {"quantization": "nf4", "micro_batches": 2, "mesh": [1, 8, 1]},
    {"quantization": "int8", "micro_batches": 2, "mesh": [1, 4, 2]},
]


@pytest.fixture(scope="module")
def one_device(on_devices):
    """{format of the base: numbers on a single device}."""
    formats = [None, "nf4", "int8"]
    return dict(zip(formats, numbers(on_devices, 1, [{**ONE, "quantization": each} for each in formats]), strict=True))


def numbers(on_devices, devices: int, cases: list[dict]) -> list[dict]:
    code = (
        "import json; from tests.multi_device.same_numbers import numbers;"
        f"print(json.dumps([numbers(**case) for case in {cases!r}]))"
    )
    return json.loads(on_devices(devices, code))


@pytest.mark.slow
def test_every_mesh_gives_the_numbers_of_one_device(on_devices, one_device):
    """Six meshes and micro-batch counts, three more over a quantised base; dropout is on."""
    cases = CASES + QUANTISED
    for case, found in zip(cases, numbers(on_devices, 8, cases), strict=True):
        expected = one_device[case.get("quantization")]
        # A gradient summed once too often over 8 devices would be 8 times too large, whatever the loss says.
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-4, err_msg=str(case))
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5, err_msg=str(case))
        assert found["evaluation"].keys() == expected["evaluation"].keys()
        for name, value in expected["evaluation"].items():
            assert found["evaluation"][name] == pytest.approx(value, rel=1e-5), case
        for name, value in expected["adapters"].items():
            assert found["adapters"][name] == pytest.approx(value, rel=1e-4), (case, name)
