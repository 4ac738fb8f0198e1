"""Kept clean copies on a mesh give the losses of one device."""

import pytest

CODE = """
import numpy as np
from difflm_jax.diffusion.lossless import Draft
from tests.training.test_clean_copies import trainer

draft = Draft(rows=3, curriculum=(3,), anchors=2)
one = trainer((1, 1, 1), draft)(1.0)[0]
for shape in ((8, 1, 1), (2, 4, 1)):
    train = trainer(shape, draft)
    for gib in (1.0, None):
        np.testing.assert_allclose(train(gib)[0], one, rtol=1e-5)
print("same")
"""


@pytest.mark.slow
def test_eight_devices_have_the_losses_of_one(on_devices):
    """Over data and over data x fsdp, with clean copies that are kept and with clean rows in each step."""
    assert on_devices(8, CODE).strip().endswith("same")
