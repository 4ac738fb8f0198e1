"""The same losses, gradients and adapters on 1 and on 8 devices, and for any number of micro-batches."""

import json

import numpy as np
import pytest

CASES = [(1, 4), (8, 1), (8, 2), (2, 8)]


@pytest.fixture(scope="module")
def one_device(on_devices):
    return numbers(on_devices, 1, 1)


def numbers(on_devices, devices: int, micro_batches: int) -> dict:
    code = f"from tests.multi_device.same_numbers import main; main({micro_batches})"
    found = json.loads(on_devices(devices, code))
    assert found["devices"] == devices
    return found


@pytest.mark.parametrize(("devices", "micro_batches"), CASES)
def test_equal_to_one_device_and_one_micro_batch(on_devices, one_device, devices, micro_batches):
    found = numbers(on_devices, devices, micro_batches)
    # A gradient summed once too often over 8 devices would be 8 times too large, whatever the loss says.
    np.testing.assert_allclose(found["norms"], one_device["norms"], rtol=1e-4)
    np.testing.assert_allclose(found["losses"], one_device["losses"], rtol=1e-6)
    assert found["evaluation"].keys() == one_device["evaluation"].keys()
    for name, value in one_device["evaluation"].items():
        assert found["evaluation"][name] == pytest.approx(value, rel=1e-5)
    for name, value in one_device["adapters"].items():
        assert found["adapters"][name] == pytest.approx(value, rel=1e-4)
