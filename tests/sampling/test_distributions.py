"""Draws have the distributions of the papers: chi-square tests on toy denoisers.

These denoisers emit the number of the current step as the token, so the final canvas shows when each was committed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.sampling.batching import row_keys
from difflm_jax.sampling.loop import Canvas, Loop, Plan
from difflm_jax.sampling.options import sampling_options
from difflm_jax.sampling.proposal import draw, drawn_from
from difflm_jax.sampling.schedule import quotas, time_of, timesteps
from tests.oracles.samplers import remdm_rates

ROWS, MASK = 20_000, 20
# Quantiles of chi-square at 1 - 1e-4, by degrees of freedom: a wrong test in ten thousand.
QUANTILE = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9, 15: 44.3}


@pytest.mark.parametrize("steps", [1, 2, 7, 128])
def test_the_samplers_own_times_are_those_of_the_host(steps: int) -> None:
    found = jax.jit(jax.vmap(time_of, in_axes=(0, None)))(jnp.arange(steps + 1), steps)
    np.testing.assert_allclose(found, timesteps(steps), rtol=1e-4, atol=0)


def check(values: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square of the counts of 0, 1, ... against their probabilities; values of probability 0 must not occur."""
    counts = np.bincount(values, minlength=len(expected)).astype(float)
    assert len(counts) == len(expected)
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0] * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < QUANTILE[len(expected) - 1]


@functools.partial(jax.jit, static_argnames=("length", "steps"))
def _when(bias_T, quotas_BNS, keys_B, sampling, length, steps):
    """Returns the step that committed each token, [ROWS, length]. `bias_T` is its logit above all others."""

    def predict(cache, _tokens_BL, turn):
        is_now_BV = jnp.arange(MASK + 1) == turn.step[:, None]
        return jnp.where(is_now_BV[:, None], bias_T[:, None], 0.0), cache, None

    tokens = jnp.full((ROWS, length), MASK)
    masks, real, prompts = tokens == MASK, jnp.ones((ROWS, length), bool), jnp.zeros(ROWS, jnp.int32)
    canvas = Canvas(tokens, real, masks, prompts, jnp.full((ROWS, 1), steps), quotas_BNS, keys_B)
    loop = Loop(predict, canvas, Plan(0, 1, length, steps), sampling, MASK, ())
    return loop.run(loop.start())


def when(bias, steps, keys=None, **options) -> np.ndarray:
    bias = np.asarray(bias, np.float32)
    sampling = sampling_options("full", "probability", {"stop_at_eos": False, **options})
    schedule = quotas(sampling.schedule, np.full((ROWS, 1), len(bias)), np.full((ROWS, 1), steps), steps)
    keys = jax.random.split(jax.random.key(5), ROWS) if keys is None else keys
    return np.asarray(_when(bias, schedule, keys, sampling, len(bias), steps).tokens)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.8}, {"temperature": 1.5, "top_p": 0.7}, {"temperature": 1.0, "top_k": 3}], ids=str
)
def test_tokens_are_drawn_from_the_filtered_softmax(options):
    """One of these tokens has a probability near 1e-3: the tail of the Gumbel noise must not be cut off."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, -4.0], np.float32)
    p = np.exp(logits / options["temperature"])
    p /= p.sum()
    if "top_p" in options:
        p[1:][np.cumsum(p)[:-1] > options["top_p"]] = 0.0
    p[options.get("top_k", 5) :] = 0.0
    sampling = sampling_options("full", "probability", options)
    drawn = drawn_from(jnp.broadcast_to(logits, (ROWS, 1, 5)), sampling)
    check(np.asarray(draw(drawn, jax.random.split(jax.random.key(3), ROWS)))[:, 0], p / p.sum())


def test_origin_reveals_each_mask_at_its_own_time():
    """P(revealed from t to s) is t - s, position by position, whatever the confidence."""
    times = timesteps(6)
    found = when([3.0, 9.0], 6, algorithm="origin")
    for position in range(2):
        check(found[:, position], times[:-1] - times[1:])
    both = (found[:, 0] == 0) & (found[:, 1] == 0)
    check(both.astype(int), np.array([1 - (1 - times[1]) ** 2, (1 - times[1]) ** 2]))


@pytest.mark.parametrize("algorithm", ["random", "probability"])
def test_a_random_order_is_uniform_and_a_confident_one_is_not_random(algorithm):
    found = when([1.0, 2.0, 3.0, 4.0], 4, algorithm=algorithm)
    if algorithm == "random":
        for step in range(4):
            check((found == step).argmax(axis=1), np.full(4, 0.25))
    else:
        assert (found == [3, 2, 1, 0]).all()


def test_alg_temp_draws_positions_from_the_softmax_of_their_confidence():
    """The first of four positions, and the second given the first: draws without replacement."""
    bias, temperature = np.array([1.0, 2.0, 3.0, 4.0]), 0.2
    p = np.exp(bias) / (np.exp(bias) + MASK - 1)  # 20 tokens besides the mask
    weight = np.exp(p / temperature)
    found = when(bias, 4, algorithm="maskgit_plus", alg_temp=temperature)
    first, second = (found == 0).argmax(axis=1), (found == 1).argmax(axis=1)
    check(first, weight / weight.sum())
    given = weight * (np.arange(4) != 3)
    check(second[first == 3], given / given.sum())


@pytest.mark.parametrize(("strategy", "eta"), [("cap", 0.3), ("rescale", 0.6)])
def test_remdm_is_the_chain_of_the_paper(strategy, eta):
    """The step of the last commit of a token, against the exact law of masked -> committed -> masked again."""
    steps, times = 5, timesteps(5)
    law, masked = np.zeros(steps), 1.0  # law[i]: committed at step i and still there
    for i in range(steps):
        sigma, reveal = remdm_rates(strategy, eta, 1 - times[i], 1 - times[i + 1])
        reveal = 1.0 if i == steps - 1 else reveal
        back = law.sum() * sigma
        law *= 1 - sigma
        law[i] = masked * reveal
        masked += back - masked * reveal
    assert masked == pytest.approx(0, abs=1e-12)
    assert law[0] < (times[0] - times[1]) - 0.01  # tokens of the first step were remasked
    found = when([3.0, 9.0], steps, remask=strategy, remask_eta=eta)
    for position in range(2):
        check(found[:, position], law)


def test_remdm_conf_takes_back_the_unsure_ones():
    """Two steps back from t to s share out (1 - alpha_s) / alpha_t by the softmax of minus the confidence."""
    bias = np.array([1.0, 6.0, 6.0])
    p = np.exp(bias) / (np.exp(bias) + MASK - 1)
    steps, times = 3, timesteps(3)
    found = when(bias, steps, remask="conf")
    # Rows whose three tokens were all committed at step 0 would need that to be seen; follow the exact law instead.
    law = np.zeros((steps, 3))
    states = {(None, None, None): 1.0}  # step of each committed token -> probability
    for i in range(steps):
        following: dict = {}
        for state, probability in states.items():
            there = [j for j in range(3) if state[j] is not None]
            sigma = dict.fromkeys(range(3), 0.0)
            if there:
                shares, _ = remdm_rates("conf", 0, 1 - times[i], 1 - times[i + 1], [p[j] for j in there])
                sigma |= dict(zip(there, shares, strict=True))
            reveal = 1.0 if i == steps - 1 else (times[i] - times[i + 1]) / times[i]
            for outcome in np.ndindex(2, 2, 2):
                weight, after = probability, []
                for j in range(3):
                    change = sigma[j] if state[j] is not None else reveal
                    weight *= change if outcome[j] else 1 - change
                    changed = i if state[j] is None else None
                    after.append(changed if outcome[j] else state[j])
                following[tuple(after)] = following.get(tuple(after), 0.0) + weight
        states = following
    for state, probability in states.items():
        for j in range(3):
            law[state[j], j] += probability
    for position in range(3):
        check(found[:, position], law[:, position])
    assert law[0, 0] < law[0, 1]


def test_different_prompts_draw_independently():
    """Which of four masks chance opens first, for prompts that each occur once: they used to open in the same order."""
    rows = [np.array([number, *[MASK] * 4]) for number in range(ROWS)]
    found = when(np.full(4, 3.0), 4, keys=row_keys(7, rows), algorithm="random")
    check(found.argmin(axis=1), np.full(4, 0.25))
    pairs = 4 * found[0::2].argmin(axis=1) + found[1::2].argmin(axis=1)
    check(pairs, np.full(16, 1 / 16))


def test_a_row_draws_the_same_alone_and_in_a_batch_and_its_copies_differently():
    rows = [np.array([number, MASK]) for number in (1, 2, 1, 3, 1)]
    together, alone = (jax.random.key_data(row_keys(7, some)) for some in (rows, rows[3:4]))
    np.testing.assert_array_equal(together[3], alone[0])
    assert len({tuple(key) for key in np.asarray(together).tolist()}) == 5
    assert (np.asarray(jax.random.key_data(row_keys(8, rows))) != np.asarray(together)).any(axis=1).all()
