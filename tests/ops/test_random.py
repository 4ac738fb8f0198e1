"""Draws per token, and dropout: the right share, independent, and a function of the token only."""

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.models.lora import dropout
from difflm_jax.ops.random import fold_seeds, token_seeds, uniform

WIDTH = 512
SEEDS = token_seeds(jax.random.key(0), jnp.arange(8)[:, None], jnp.arange(64)[None])


def kept(seeds, rate=0.25):
    return np.asarray(dropout(jnp.ones((*seeds.shape, WIDTH)), rate, seeds)) != 0


def test_what_is_kept_is_scaled_and_its_share_is_right():
    x = jnp.arange(1.0, WIDTH + 1)[None, None] * jnp.ones((8, 64, 1))
    y = np.asarray(dropout(x, 0.25, SEEDS))
    np.testing.assert_allclose(y[y != 0], (np.asarray(x) / 0.75)[y != 0], rtol=1e-6)
    deviation = np.sqrt(0.25 * 0.75 / y.size)
    assert abs((y != 0).mean() - 0.75) < 4 * deviation
    assert not (y == 0).all(axis=-1).any()


def test_masks_of_elements_tokens_layers_and_inputs_are_uncorrelated():
    """Compares counts of equal pairs with the binomial distribution of independent masks."""
    mask = kept(SEEDS).reshape(-1, WIDTH)
    agree, deviation = 0.75**2 + 0.25**2, np.sqrt(0.625 * 0.375 / (mask.size / 2))
    layers = [kept(fold_seeds(SEEDS, layer)).reshape(-1, WIDTH) for layer in range(3)]
    inner = [
        kept(fold_seeds(fold_seeds(SEEDS, layer), stream)).reshape(-1, WIDTH) for layer in (0, 1) for stream in (0, 1)
    ]
    pairs = [(mask[:, 1:], mask[:, :-1]), (mask[:, 64:], mask[:, :-64]), (mask[1:], mask[:-1])]
    pairs += [(a, b) for group in ([mask, *layers], inner) for i, a in enumerate(group) for b in group[:i]]
    for a, b in pairs:
        assert abs((a == b).mean() - agree) < 5 * deviation


def test_a_token_and_every_element_has_its_own_share():
    """Chi-square over columns and over tokens: none is dropped more often than by chance."""
    mask = kept(SEEDS).reshape(-1, WIDTH)
    for axis in (0, 1):
        count, size = mask.sum(axis=axis), mask.shape[axis]
        chi_square = ((count - 0.75 * size) ** 2 / (size * 0.75 * 0.25)).sum()
        assert abs(chi_square - len(count)) < 5 * np.sqrt(2 * len(count))


def test_the_mask_does_not_depend_on_the_other_tokens():
    np.testing.assert_array_equal(kept(SEEDS[2:3, 10:20]), kept(SEEDS)[2:3, 10:20])


def test_draws_of_tokens_are_uniform_and_uncorrelated_along_examples_and_positions():
    seeds = token_seeds(jax.random.key(3), jnp.arange(300)[:, None], jnp.arange(500)[None])
    draws = np.asarray(uniform(seeds))
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_square = ((counts - draws.size / 100) ** 2 / (draws.size / 100)).sum()
    assert abs(chi_square - 99) < 5 * np.sqrt(2 * 99)
    centred = (draws - 0.5) / np.sqrt(1 / 12)
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)
    other = np.asarray(uniform(token_seeds(jax.random.key(4), jnp.arange(300)[:, None], jnp.arange(500)[None])))
    assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(draws.size)
    assert len(np.unique(np.asarray(seeds))) > 0.999 * draws.size
