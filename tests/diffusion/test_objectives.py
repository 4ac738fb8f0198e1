"""Tests the objectives against their formulas, written out here one position at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.diffusion.corruption import Corruption, NoisyBatch, corrupt
from difflm_jax.diffusion.extras.annealing import grown_block_length, open_edges, open_share
from difflm_jax.diffusion.extras.complementary import complementary_pairs
from difflm_jax.diffusion.extras.on_policy import least_confident
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.weights import LossRule, loss_weights
from difflm_jax.ops.random import token_seeds
from tests.diffusion.test_corruption import KEY, MASK, batch

EOS = 7


def weights_of(parts, *rule, **settings):
    """Returns `loss_weights` of a batch from `drawn`."""
    candidates, masked, segments, positions, rates, clean = map(jnp.asarray, parts)
    none = jnp.zeros_like(rates)
    noisy = NoisyBatch(clean, clean, segments, positions, positions, candidates, masked, rates, none, none, none)
    return loss_weights(noisy, LossRule(*rule, **settings))


def drawn(rows=6, length=12, rate=0.4, seed=0):
    """(candidates, masked, segments, positions, rates, clean): a prompt of 3 tokens; answers end in 1 to 3 EOS."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, length + 1, rows)
    valid = np.arange(length) < lengths[:, None]
    candidates = valid & (np.arange(length) >= 3)
    clean = rng.integers(10, 90, (rows, length))
    for row, end in enumerate(lengths):
        clean[row, end - 1 - row % 3 : end] = EOS
    masked = candidates & (rng.random((rows, length)) < rate)
    positions = np.tile(np.arange(length), (rows, 1))
    return candidates, masked, valid.astype(np.int32), positions, np.full((rows, length), rate), clean


def test_cart_weights_are_dreams_sum_over_visible_tokens():
    """w_n = 1/2 sum over unmasked m != n of p (1 - p)^(|m - n| - 1), p = 0.3; padding does not count."""
    _, masked, segments, *_ = parts = drawn()
    weights = weights_of(parts, "masked", "context")
    for row, n in np.ndindex(masked.shape):
        expected = 0.5 * sum(
            0.3 * 0.7 ** (abs(m - n) - 1)
            for m in range(masked.shape[1])
            if m != n and segments[row, m] and not masked[row, m]
        )
        assert float(weights[row, n]) == pytest.approx(expected if masked[row, n] else 0.0, rel=1e-5)


def test_lladas_sft_loss_counts_every_answer_alike():
    """(1 / B) sum_b sum_masked (CE / p) / |answer_b|: the weights are 1 / (p |answer_b|)."""
    candidates, masked, *_ = parts = drawn()
    weights = weights_of(parts, "masked", "inverse_rate", "answers")
    for row in range(len(masked)):
        expected = masked[row] / 0.4 / candidates[row].sum()
        np.testing.assert_allclose(weights[row], expected, rtol=1e-6)


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_tokens_that_fill_an_answer_up_can_be_left_out_of_the_loss(tokens):
    candidates, masked, *_, clean = parts = drawn(rate=0.8)
    weights = np.asarray(weights_of(parts, tokens, eos="first", eos_token_id=EOS))
    scored = candidates if tokens == "all" else masked
    for row in range(len(masked)):
        first = np.flatnonzero(clean[row] == EOS)[0]
        expected = scored[row] & (np.arange(scored.shape[1]) <= first)
        np.testing.assert_array_equal(weights[row], expected)


def test_examples_that_share_a_row_do_not_weigh_on_each_other():
    """Two examples packed into one row have the same weights as alone, under every rule."""
    parts = [[x[row : row + 1] for x in drawn(rows=2, rate=0.5, seed=seed)] for row, seed in ((0, 1), (1, 2))]
    packed = [np.concatenate(pair, axis=1) for pair in zip(*parts, strict=True)]
    packed[2][:, 12:] *= 2  # the second segment
    for weight, average in (("context", "tokens"), ("inverse_rate", "answers")):
        options = {"tokens": "masked", "weight": weight, "average": average, "eos": "first", "eos_token_id": EOS}
        alone = [weights_of(part, **options) for part in parts]
        together = weights_of(packed, **options)
        np.testing.assert_allclose(together, np.concatenate(alone, axis=1), rtol=1e-6)


@pytest.mark.parametrize("weight", ["uniform", "inverse_rate"])
def test_of_a_complementary_pair_every_candidate_is_hidden_in_exactly_one(weight):
    rule = Corruption(
        DiffusionConfig(mask_token_id=MASK),
        scope="answer",
        mask_rate="row",
        loss=LossRule("masked", weight),
        extras=Extras(complementary=True),
    )
    noisy = corrupt(KEY, batch(), rule)
    pairs = complementary_pairs(noisy, rule)
    first = jax.tree.map(lambda x: np.asarray(x)[:64], pairs)
    second = jax.tree.map(lambda x: np.asarray(x)[64:], pairs)
    np.testing.assert_array_equal(first.masked ^ second.masked, noisy.candidates)
    assert not (first.masked & second.masked).any()
    np.testing.assert_array_equal(first.tokens, noisy.tokens)
    np.testing.assert_array_equal(second.tokens, np.where(second.masked, MASK, batch().tokens))
    np.testing.assert_allclose(first.rates + second.rates, 1.0, rtol=1e-6)
    one = 1.0 if weight == "uniform" else second.rates
    np.testing.assert_allclose(second.weights * one, second.masked, rtol=1e-5)


def test_the_least_confident_of_each_group_stay_open():
    rng = np.random.default_rng(3)
    confidence = rng.choice([-3.0, -2.0, -1.0, -0.5], (4, 15))  # with ties
    opened, group = rng.random((4, 15)) < 0.7, np.sort(rng.integers(0, 3, (4, 15)), axis=1)
    count = np.array([1, 2, 3])[group]
    left = least_confident(*(jnp.asarray(x) for x in (confidence, opened, group, count)))
    for row in range(4):
        for each in range(3):
            where = np.flatnonzero(opened[row] & (group[row] == each))
            order = sorted(where, key=lambda i: (confidence[row, i], -i))  # among equals the rightmost stays open
            expected = np.zeros(15, bool)
            expected[order[: each + 1]] = True
            np.testing.assert_array_equal(np.asarray(left[row]) & (group[row] == each), expected)


def test_the_share_of_open_edges_is_diffullamas_line_or_slower():
    shares = [float(open_share(step, 50, 1.0)) for step in range(60)]
    np.testing.assert_allclose(shares, [min(1, (step + 1) / 50) for step in range(60)], rtol=1e-6)
    assert float(open_share(4, 50, 3.0)) == pytest.approx(0.1**3, rel=1e-5)


def test_open_edges_are_a_function_of_example_query_and_key():
    position = jnp.arange(64)
    positions, examples = jnp.tile(position, (2, 1)), jnp.array([[5], [9]]) + 0 * position
    edges = np.asarray(open_edges(token_seeds(KEY, examples, positions), positions, 0.25))
    assert abs(edges.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / edges.size)
    assert (edges[0] != edges[1]).any()
    # the place in a batch, padding, or an example before it do not change a draw
    packed_positions = jnp.concatenate([position[:10], position[:40]])[None]
    packed_examples = jnp.array([[2] * 10 + [9] * 40])
    packed = open_edges(token_seeds(KEY, packed_examples, packed_positions), packed_positions, 0.25)
    np.testing.assert_array_equal(packed[0, 10:, 10:], edges[1, :40, :40])


def test_an_annealed_mask_is_causal_or_open_within_the_rule():
    """A token attends if the rule allows it and the edge is causal or drawn open (DiffuLLaMA)."""
    position = jnp.arange(10)[None]
    valid, prompt = position < 9, jnp.array([3])
    opened = jax.random.bernoulli(jax.random.key(0), 0.4, (1, 10, 10))
    for rule in ("full", "prefix", "block"):
        config = DiffusionConfig(rule, 4 if rule == "block" else 0)
        see = functools.partial(config.view, Layout(position, valid, prompt))
        query, key = np.arange(10)[:, None], np.arange(10)[None, :]
        expected = np.asarray(see().mask)[0] & ((key <= query) | np.asarray(opened[0]))
        np.testing.assert_array_equal(see(open_BTS=opened).mask[0], expected)
        causal = config.causal().view(Layout(position, valid, prompt)).mask
        np.testing.assert_array_equal(see(open_BTS=jnp.zeros_like(opened)).mask, causal)


def test_blocks_grow_by_doubling_and_end_whole():
    lengths = [int(grown_block_length(step, 8, 16)) for step in range(12)]
    assert lengths == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 16, 16]
    assert [int(grown_block_length(step, 3, 6)) for step in range(5)] == [1, 2, 4, 6, 6]
