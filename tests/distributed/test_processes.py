"""What several processes decide and write together."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from difflm_jax.distributed.processes import by_one_process
from difflm_jax.errors import UserError


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
