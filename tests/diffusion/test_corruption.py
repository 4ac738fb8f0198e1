"""Tests what each rule hides and scores, and that noise depends only on the example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption, corrupt, mask_rates
from difflm_jax.diffusion.weights import LossRule

MASK = 99
RULE = DiffusionConfig(mask_token_id=MASK)
BLOCKS = DiffusionConfig("block", 4, mask_token_id=MASK)
KEY = jax.random.key(7)


def batch(rows=64, length=40, prompt=10, ids=None):
    rng = np.random.default_rng(0)
    lengths = rng.integers(prompt + 2, length + 1, rows)
    position = np.arange(length)
    return CleanBatch.of_rows(
        tokens=jnp.asarray(rng.integers(0, 90, (rows, length)), jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        answer_mask=jnp.asarray((position >= prompt) & (position < lengths[:, None])),
        prompt_lengths=jnp.full(rows, prompt, jnp.int32),
        example_ids=jnp.arange(rows, dtype=jnp.int32) if ids is None else jnp.asarray(ids, jnp.int32),
        strata=jnp.arange(rows) / rows,
    )


def test_pretraining_hides_real_tokens_at_one_rate_and_scores_every_real_token():
    rows = batch()
    noisy = corrupt(KEY, rows, Corruption(RULE))
    valid = np.asarray(rows.segments) > 0
    assert len(np.unique(noisy.rates)) == 1
    np.testing.assert_array_equal(noisy.weights, valid)
    assert not (np.asarray(noisy.masked) & ~valid).any()
    share = np.asarray(noisy.masked)[valid].mean()
    assert abs(share - float(noisy.rates[0, 0])) < 4 * np.sqrt(0.25 / valid.sum())
    np.testing.assert_array_equal(noisy.tokens, np.where(noisy.masked, MASK, rows.tokens))


def test_rates_of_many_steps_fill_their_interval():
    one = jnp.zeros((1, 1), jnp.int32)
    rates = [float(mask_rates(jax.random.key(i), Corruption(RULE), one, one)[0, 0]) for i in range(400)]
    assert 0.1 <= min(rates) < 0.13
    assert 0.92 < max(rates) <= 0.95
    assert abs(np.mean(rates) - 0.525) < 0.04


def test_sft_hides_and_scores_answers_only():
    rows = batch()
    noisy = corrupt(KEY, rows, Corruption(RULE, scope="answer"))
    assert not np.asarray(noisy.masked)[:, :10].any()
    np.testing.assert_array_equal(noisy.weights, rows.answer_mask)
    np.testing.assert_array_equal(noisy.prompt_lengths, rows.prompt_lengths)


def test_masked_only_with_inverse_rate_weights():
    noisy = corrupt(KEY, batch(), Corruption(RULE, mask_rate="row", loss=LossRule("masked", "inverse_rate")))
    np.testing.assert_allclose(noisy.weights, np.asarray(noisy.masked) / np.asarray(noisy.rates), rtol=1e-6)


def test_row_rates_are_stratified():
    rule = Corruption(RULE, mask_rate="row", min_rate=0.0, max_rate=1.0)
    rates = np.asarray(mask_rates(KEY, rule, jnp.arange(16)[:, None] / 16, jnp.tile(jnp.arange(5), (16, 1))))
    np.testing.assert_array_equal(np.floor(np.sort(rates[:, 0]) * 16), np.arange(16))
    assert (rates == rates[:, :1]).all()


def test_block_rates_are_stratified_over_rows_and_over_the_blocks_of_a_row():
    rule = Corruption(BLOCKS, mask_rate="block", min_rate=0.0, max_rate=1.0)
    blocks = jnp.tile(jnp.arange(8), (16, 1))
    rates = np.asarray(mask_rates(KEY, rule, jnp.arange(16)[:, None] / 16, blocks))
    for block in range(8):
        np.testing.assert_array_equal(np.floor(np.sort(rates[:, block]) * 16), np.arange(16))
    assert (np.sort(rates, axis=1)[:, 0] < 0.25).all()  # every row has low and high rates
    assert (np.sort(rates, axis=1)[:, -1] > 0.75).all()


def test_block_rates_are_one_a_block_counted_from_the_end_of_the_prompt():
    rule = Corruption(BLOCKS, scope="answer", mask_rate="block")
    rows = batch(prompt=10)
    noisy = corrupt(KEY, rows, rule)
    is_long = np.asarray(rows.segments)[:, 37] > 0
    rates = np.asarray(noisy.rates)[is_long, 10:38].reshape(-1, 7, 4)
    assert len(rates) > 4
    assert (rates == rates[:, :, :1]).all()
    assert (np.diff(rates[:, :, 0], axis=1) != 0).all()


def test_the_inverse_rate_loss_is_an_unbiased_sum_over_tokens():
    """E[sum of masked 1/p] is the number of tokens, whatever the rates (the diffusion bound's weight)."""
    rule = Corruption(RULE, mask_rate="row", loss=LossRule("masked", "inverse_rate"))
    rows = batch()
    totals = [float(corrupt(jax.random.key(i), rows, rule).weights.sum()) for i in range(60)]
    expected = float((rows.segments > 0).sum())
    assert abs(np.mean(totals) - expected) < 4 * np.std(totals) / np.sqrt(60)


@pytest.mark.parametrize("rule", [Corruption(DiffusionConfig("prefix", mask_token_id=MASK)), Corruption(BLOCKS)])
def test_prefix_and_block_pretraining_keep_a_random_clean_prompt(rule):
    rows = batch()
    noisy = corrupt(KEY, rows, rule)
    valid = np.asarray(rows.segments) > 0
    prompts = np.asarray(noisy.prompt_lengths)[:, 0]
    assert (np.asarray(noisy.prompt_lengths) == prompts[:, None])[valid].all()
    assert (prompts < valid.sum(axis=1)).all()
    assert len(set(prompts.tolist())) > 10
    before = np.arange(40) < prompts[:, None]
    assert not np.asarray(noisy.masked)[before].any()
    assert not np.asarray(noisy.weights)[before].any()


@pytest.mark.parametrize("scope", ["all", "answer"])
def test_with_the_shift_the_first_token_is_neither_hidden_nor_scored(scope):
    rows = batch(prompt=0)
    noisy = corrupt(
        KEY, rows, Corruption(DiffusionConfig(logit_shift=True, mask_token_id=MASK), scope=scope, min_rate=0.95)
    )
    assert not np.asarray(noisy.masked)[:, 0].any()
    assert not np.asarray(noisy.weights)[:, 0].any()


def test_noise_depends_on_the_example_not_on_its_place_or_padding():
    rows = batch(ids=np.arange(64) + 1000)
    whole = corrupt(KEY, rows, Corruption(RULE))
    some = jnp.array([40, 3, 17])
    part = corrupt(KEY, jax.tree.map(lambda x: x[some], rows), Corruption(RULE))
    np.testing.assert_array_equal(part.tokens, whole.tokens[some])
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 24))[: x.ndim]), rows)
    np.testing.assert_array_equal(corrupt(KEY, wide, Corruption(RULE)).tokens[:, :40], whole.tokens)
    other_step = corrupt(jax.random.key(8), rows, Corruption(RULE))
    assert (other_step.tokens != whole.tokens).any()


def test_filler_rows_count_for_nothing():
    rows = batch().replace(segments=jnp.zeros((64, 40), jnp.int32), example_ids=jnp.full((64, 40), -1, jnp.int32))
    noisy = corrupt(KEY, rows, Corruption(RULE))
    assert not np.asarray(noisy.weights).any()
    assert not np.asarray(noisy.masked).any()
