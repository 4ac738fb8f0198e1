"""Speculative sampling on a rigged model: what is generated is distributed as draws from the base."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.sampling import verification
from difflm_jax.sampling.drafts import Drafting
from difflm_jax.sampling.options import Sampling
from difflm_jax.sampling.speculative import Loop, Predictor

VOCABULARY, LENGTH, ROWS = 5, 4, 60_000
BASE = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
DRAFT = np.random.default_rng(1).normal(size=(LENGTH + 1, VOCABULARY, VOCABULARY)).astype(np.float32)
SAMPLING = Sampling(algorithm="probability", schedule="even", temperature=0.8, stop_at_eos=False)


def rigged() -> Predictor:
    """A base that knows the last token, and drafts that know the token before the noise and how far it is away."""

    def predict(cache, rows):
        if rows.gate is None:
            return jnp.asarray(BASE)[rows.tokens], None
        place = jnp.where(rows.sees & ~rows.gate[:, None, :], rows.positions[:, None, :] + 1, 0)
        seed = jnp.argmax(place, axis=2)
        depth = rows.positions - jnp.take_along_axis(rows.positions, seed, axis=1)
        of_draft = jnp.asarray(DRAFT)[depth, jnp.take_along_axis(rows.tokens, seed, axis=1)]
        return jnp.where(rows.gate[..., None], of_draft, jnp.asarray(BASE)[rows.tokens]), None

    return Predictor(predict, lambda cache, kept, starts: None)


def z_score(drafting: Drafting) -> float:
    """How many standard deviations the counts of all answers lie from those of direct sampling."""
    prompt = jnp.tile(jnp.array([[3, 1, 3]], jnp.int32), (ROWS, 1))
    tokens = jnp.pad(prompt, ((0, 0), (0, LENGTH + drafting.deepest + 1)))
    lengths = jnp.full(ROWS, 3, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(ROWS))

    @jax.jit
    def run(tokens, lengths, keys):
        loop = Loop(rigged(), drafting, SAMPLING, lengths + LENGTH, keys, VOCABULARY, None, ())
        return loop.run(loop.start(tokens, lengths, None))

    carry = run(tokens, lengths, keys)
    answers = np.asarray(carry.tokens)[:, 3 : 3 + LENGTH]
    assert (carry.passes < 2 * LENGTH).any()  # drafts were accepted
    p = np.asarray(jax.nn.softmax(BASE / 0.8, axis=-1), np.float64)
    cells = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    expected = np.array([np.prod([p[a, b] for a, b in itertools.pairwise((3, *cell))]) for cell in cells]) * ROWS
    counts = np.bincount(answers @ VOCABULARY ** np.arange(LENGTH)[::-1], minlength=len(cells))
    rare = expected < 5
    expected, counts = (np.append(x[~rare], x[rare].sum()) for x in (expected, counts))
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("strategy", "lookup"), [("two_pass", True), ("one_pass", False), ("likeliest", True), ("tree", False)]
)
def test_samples_are_distributed_as_the_base(strategy, lookup):
    assert abs(z_score(Drafting(strategy, 3, lookup, nodes=8, branches=3))) < 4


def test_a_wrong_residual_is_seen(monkeypatch):
    """The test above can fail: here the token after a rejection is drawn from p instead of max(p - q, 0)."""
    monkeypatch.setattr(verification, "residual", lambda p_BV, q_BV: p_BV)
    assert z_score(Drafting("one_pass", 3, False)) > 20
