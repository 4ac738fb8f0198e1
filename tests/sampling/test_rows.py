"""Rows of a batch in blocks of their own, and more rows than places: none waits, and each answer is the row's own."""

import functools

import jax
import numpy as np
import pytest

import difflm_jax
from difflm_jax.sampling import caches, places
from difflm_jax.sampling.loop import Loop, Plan
from tests.sampling import rigged
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    model_dir = save_tiny_model(tmp_path_factory.mktemp("model"))
    return functools.cache(
        lambda attention, block=None, shift=False: difflm_jax.load(
            model_dir, attention=attention, block_length=block, logit_shift=shift, dtype="float32"
        )
    )


def test_a_row_that_is_done_with_its_block_does_not_wait_for_the_others(monkeypatch):
    """The batch runs as often as its slowest row, not as often as the slowest row of each block."""
    plan, ran = Plan(2, 4, 4, 4), []
    whole = Loop.step

    def counted(self, carry):
        jax.debug.callback(lambda: ran.append(1))
        return whole(self, carry)

    monkeypatch.setattr(Loop, "step", counted)
    tokens = rigged.rows(3, 5, 2, 16)
    jax.clear_caches()
    carry = rigged.run(rigged.Rigged(18, 3, scale=5.0), tokens, plan, threshold=0.6, stop_at_eos=False)
    passes = np.asarray(carry.passes)
    jax.effects_barrier()
    assert len(set(passes.tolist())) > 1
    assert len(ran) == passes.max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "block", "shift", "options"),
    [
        ("prefix", None, True, {"block_length": 4}),
        ("block", 4, True, {"temperature": 0.7, "seed": 5}),
        ("causal_context", 4, True, {}),
        ("full", None, True, {"block_length": 8, "cache": "dual", "cfg_scale": 0.5}),
        ("full", None, False, {"block_length": 8, "cache": "prefix", "refresh_interval": 2}),
    ],
    ids=str,
)
def test_rows_of_a_long_set_take_turns_and_are_what_they_are_alone(load, attention, block, shift, options, monkeypatch):
    """Blocks end after different numbers of passes, answers too. Rows join as soon as a place is free."""
    monkeypatch.setattr(places, "joining_cost", lambda *_: 1)
    lm, rng = load(attention, block, shift), np.random.default_rng(2)
    rows = [rng.integers(0, 250, n).tolist() for n in (9, 3, 12, 6, 15, 4, 8, 11, 5, 7)]
    options = {"max_new_tokens": 16, "steps": 16, "threshold": 0.12, "algorithm": "probability", **options}
    together = lm.generate(rows, batch_size=4, **options)
    assert len(set(together.steps.tolist())) > 1
    for row, tokens in enumerate(rows):
        alone = lm.generate([tokens], batch_size=1, **options)
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
        assert alone.steps[0] == together.steps[row]
        assert alone.committed[0] == together.committed[row]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 256], ids=["a block alone", "two blocks at once"])
def test_the_keys_of_a_finished_block_are_those_of_a_whole_forward(load, tokens, monkeypatch):
    """Rows that finish a block while others fill theirs: tokens and passes of decoding without a cache."""
    monkeypatch.setattr(caches, "TOKENS_OF_ONE_READ", tokens)
    jax.clear_caches()  # what is compiled does not know of the change
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, 250, n).tolist() for n in (5, 9, 2, 7)]
    for attention, shift in (("block", True), ("causal_context", False)):
        lm = load(attention, 4, shift)
        options = {"max_new_tokens": 24, "threshold": 0.12, "algorithm": "probability", "eos_penalty": float("inf")}
        cached, whole = lm.generate(rows, **options), lm.generate(rows, cache="none", **options)
        assert [row.tolist() for row in cached.tokens] == [row.tolist() for row in whole.tokens]
        assert cached.steps.tolist() == whole.steps.tolist()
        assert len(set(cached.steps.tolist())) > 1
