"""The message before weights are read: fits, tight, or will not fit with advice on what to change."""

import jax
import pytest

from difflm_jax import UserError
from difflm_jax.loading import ModelSpec, open_model
from difflm_jax.planning import fit
from difflm_jax.planning.estimate import device_bytes


@pytest.fixture(scope="module")
def opened(tiny_dir):
    return open_model(ModelSpec(str(tiny_dir), dtype="float32"))


def test_weights_are_counted_as_they_will_lie_in_memory(opened, tiny_lm):
    found = fit.generation_fit(opened, rows=2, columns=64)
    assert found.parts["weights"] == sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_lm.params))
    assert found.parts["adapters"] == device_bytes(opened.lora) == 0
    assert found.needed == sum(found.parts.values())


def test_the_verdict_follows_from_what_is_free(opened, monkeypatch):
    needed = fit.generation_fit(opened, 2, 64).needed
    for free, verdict in (
        (10 * needed, "fits"),
        (int(1.05 * needed), "tight"),
        (needed - 1, "will not fit"),
        (None, "fits"),
    ):
        monkeypatch.setattr(fit, "free_bytes", lambda free=free: free)
        assert fit.generation_fit(opened, 2, 64).verdict == verdict


def test_what_will_not_fit_says_what_to_change(opened, monkeypatch):
    less = fit.generation_fit(opened, 2, 1024).needed
    monkeypatch.setattr(fit, "free_bytes", lambda: less)
    with pytest.raises(UserError, match=r"will not fit: needs .* GiB of .* free.*try --rows=2; --nocheck_fit") as error:
        fit.check_fit(opened, 8, 1024, "--nocheck_fit")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(fit, "free_bytes", lambda: 1)
    with pytest.raises(UserError, match="take a smaller model"):
        fit.check_fit(opened, 8, 1024, "--nocheck_fit")
