"""The sampler on rigged denoisers: what it commits, when, and what it must never touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difflm_jax.diffusion.denoiser import row_sampling_keys
from difflm_jax.diffusion.sampler import Plan, choose_tokens, commit_most_confident, sample
from difflm_jax.diffusion.schedule import even_quota

VOCABULARY, MASK, EOS = 11, 10, 9


@functools.partial(jax.jit, static_argnames=("plan", "eos"))
def sampled(table_LV, tokens_BL, fillable_BL, keys_B, plan, eos):
    """`sample` with a denoiser whose logits depend on the column alone."""

    def predict(tokens_BL, start):
        block = jax.lax.dynamic_slice_in_dim(table_LV, start, plan.block_length, axis=0)
        return jnp.broadcast_to(block, (tokens_BL.shape[0], *block.shape))

    return sample(predict, tokens_BL, fillable_BL, keys_B, plan, MASK, eos)


def run(table_LV, tokens_BL, plan, seed=0, eos=(EOS,), fillable=None):
    tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
    fillable = tokens_BL == MASK if fillable is None else jnp.asarray(fillable)
    keys = row_sampling_keys(seed, [tuple(map(int, row)) for row in np.asarray(tokens_BL)])
    return sampled(jnp.asarray(table_LV), tokens_BL, fillable, keys, plan, eos)


def reference(table_LV, row, plan):
    """One row of the original system's rule, written out in plain numpy."""
    row, passes = np.array(row), 0
    logits = np.array(table_LV, np.float64)
    logits[:, MASK] = -np.inf
    for block in range(plan.num_blocks):
        columns = np.arange(plan.block_length) + plan.first_column + block * plan.block_length
        quotas = None
        for step in range(plan.steps_per_block):
            committed_eos = np.flatnonzero((row == EOS) & (np.arange(len(row)) >= plan.first_column))
            end = committed_eos[0] if plan.stop_at_eos and len(committed_eos) else len(row)
            open_columns = [c for c in columns if row[c] == MASK and c < end]
            if quotas is None:
                n, s = len(open_columns), plan.steps_per_block
                quotas = [n // s + (i < n % s) for i in range(s)]
            passes += any(row[c] == MASK for c in range(plan.first_column, end))
            score = logits.max(axis=1)
            if plan.algorithm == "probability":
                score = score - np.log(np.exp(logits - score[:, None]).sum(axis=1)) - score
            for c in sorted(open_columns, key=lambda c: (-score[c], c))[: quotas[step]]:
                row[c] = logits[c].argmax()
    return row, passes


PLANS = [
    Plan(first, blocks, length, steps, 0.0, algorithm, stop_at_eos=stop)
    for first, blocks, length, steps, algorithm, stop in (
        (0, 1, 6, 6, "confidence", True),
        (2, 1, 7, 3, "confidence", True),
        (3, 3, 4, 2, "probability", True),
        (1, 4, 3, 3, "confidence", False),
        (0, 2, 5, 4, "probability", False),
        (2, 6, 1, 1, "confidence", True),
        (0, 1, 4, 7, "probability", True),
    )
]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PLANS), st.integers(0, 2**31))
def test_equals_the_rule_written_out(plan, seed):
    rng = np.random.default_rng(seed)
    first, length = plan.first_column, plan.first_column + plan.num_blocks * plan.block_length
    table = rng.normal(size=(length, VOCABULARY)).astype(np.float32) * 3
    tokens = rng.integers(0, VOCABULARY, (3, length))
    tokens[:, first:][rng.random((3, length - first)) < 0.7] = MASK
    tokens[:, :first] = rng.integers(0, 9, (3, first))
    carry = run(table, tokens, plan)
    for i in range(3):
        expected, passes = reference(table, tokens[i], plan)
        np.testing.assert_array_equal(np.asarray(carry.tokens[i]), expected)
        assert int(carry.passes[i]) == passes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0]), st.sampled_from([1, 3, 8]))
def test_only_masks_change_and_the_mask_is_never_an_output(seed, temperature, steps):
    rng = np.random.default_rng(seed)
    table = np.zeros((8, VOCABULARY), np.float32)
    table[:, MASK] = 100.0  # a model that loves its mask token
    tokens = rng.integers(0, VOCABULARY, (2, 8))
    fillable = (tokens == MASK) & (rng.random((2, 8)) < 0.8)
    plan = Plan(0, 1, 8, steps, temperature, stop_at_eos=False)
    out = np.asarray(run(table, tokens, plan, seed=seed, fillable=fillable).tokens)
    assert (out[~fillable] == tokens[~fillable]).all()
    assert (out[fillable] != MASK).all()


def test_masks_behind_a_committed_eos_stay():
    table = np.zeros((6, VOCABULARY), np.float32)
    table[:, 1] = 1.0
    table[2, EOS] = 50.0
    carry = run(table, [[MASK] * 6], Plan(0, 1, 6, 6))
    assert np.asarray(carry.tokens)[0].tolist() == [1, 1, EOS, MASK, MASK, MASK]
    assert int(carry.passes[0]) == 3
    unstopped = run(table, [[MASK] * 6], Plan(0, 1, 6, 6, stop_at_eos=False))
    assert np.asarray(unstopped.tokens)[0].tolist() == [1, 1, EOS, 1, 1, 1]


def test_an_eos_in_the_prompt_does_not_end_the_answer():
    table = np.zeros((5, VOCABULARY), np.float32)
    table[:, 1] = 1.0
    carry = run(table, [[EOS, EOS, MASK, MASK, MASK]], Plan(2, 1, 3, 3))
    assert np.asarray(carry.tokens)[0].tolist() == [EOS, EOS, 1, 1, 1]


def test_ties_commit_exactly_the_quota_from_the_left():
    confidence = jnp.zeros((1, 6))
    open_BT = jnp.array([[True, False, True, True, True, True]])
    commit = commit_most_confident(confidence, open_BT, jnp.array([3]))
    assert np.asarray(commit)[0].tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize(("masks", "steps"), [(10, 4), (3, 5), (0, 2), (128, 128)])
def test_quota_spreads_every_mask_with_the_remainder_first(masks, steps):
    quotas = [int(even_quota(jnp.array([masks]), jnp.array(i), steps)[0]) for i in range(steps)]
    assert sum(quotas) == masks
    assert quotas == sorted(quotas, reverse=True)
    assert max(quotas) - min(quotas) <= 1


def test_temperature_draws_from_the_softmax():
    """Chi-square of 20,000 draws against softmax(logits / T), with a token of probability near 1e-3 in its tail."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, -4.0], np.float32)
    temperature, draws = 0.8, 20_000
    probabilities = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    keys = jax.random.split(jax.random.key(3), draws)
    chosen = choose_tokens(jnp.broadcast_to(logits, (draws, 1, 5)), keys, jnp.array(0), temperature)
    counts = np.bincount(np.asarray(chosen)[:, 0], minlength=5)
    chi_square = ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum()
    assert chi_square < 18.5  # the 0.999 quantile at 4 degrees of freedom


def test_a_row_draws_the_same_alone_and_in_a_batch_and_copies_differ():
    table = np.zeros((6, VOCABULARY), np.float32)
    plan = Plan(1, 1, 5, 5, temperature=1.0, stop_at_eos=False)
    alone = np.asarray(run(table, [[3] + [MASK] * 5], plan).tokens)[0]
    batch = np.asarray(run(table, [[2] + [MASK] * 5, [3] + [MASK] * 5, [3] + [MASK] * 5], plan).tokens)
    np.testing.assert_array_equal(batch[1], alone)
    assert (batch[1] != batch[2]).any()
