"""Likelihoods against exact enumeration: of all masks under a real model, and of a joint distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import place
from difflm_jax.errors import UserError
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.sampling import likelihood
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.likelihood import bound, log_likelihoods, mask_counts
from tests.tiny import hidden_states, tiny_config, tiny_params

VOCABULARY, MASK = 7, 6
PROMPTS = [np.array([1, 2, 3]), np.array([4, 0]), np.array([5, 5, 1, 0, 2])]
ANSWERS = [np.array([4, 0, 2, 5, 1]), np.array([3]), np.array([1, 2])]
RULES = [("full", False, 0), ("prefix", True, 0), ("block", False, 2), ("block", True, 2), ("block_causal", False, 2)]


def decoder(attention: str, shift: bool, block_length: int) -> Decoder:
    config = tiny_config(vocab_size=VOCABULARY)
    rule = DiffusionConfig(attention, block_length, shift, MASK)
    return Decoder({"params": tiny_params(config)}, Transformer(config, mask_token_id=MASK), rule, (0,))


def log_probabilities(decoder: Decoder, rows_BL: np.ndarray, prompt_length: int) -> np.ndarray:
    """[B, L, V] of each token as decoding sees it, without the mask among the outputs."""
    model, variables = decoder.model, decoder.variables
    tokens_BL = jnp.asarray(rows_BL)
    real_BL, prompts_B = jnp.ones_like(tokens_BL, bool), jnp.full(len(rows_BL), prompt_length)
    hidden = hidden_states(model, decoder.diffusion, variables, tokens_BL, real_BL, prompts_B)
    logits = np.array(head_logits(model.config, variables["params"], None, MASK, hidden), np.float64)
    logits[..., MASK] = -np.inf
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.roll(logits, 1, axis=1) if decoder.diffusion.logit_shift else logits


def enumerated(decoder: Decoder, prompt: np.ndarray, answer: np.ndarray) -> float:
    """The bound over all masks of each block, blocks in turn behind clean ones, as text is generated."""
    size, total = decoder.diffusion.block_length or len(answer), 0.0
    first = size - len(prompt) % size if decoder.diffusion.attention == "block_causal" else size
    starts = [0, *range(first, len(answer), size)]
    for start, end in zip(starts, [*starts[1:], len(answer)], strict=True):
        known, block = np.concatenate([prompt, answer[:start]]), answer[start:end]
        hidden_BT = np.array(list(itertools.product([False, True], repeat=len(block)))[1:])
        rows_BL = np.concatenate([np.tile(known, (len(hidden_BT), 1)), np.where(hidden_BT, MASK, block)], axis=1)
        log_p = log_probabilities(decoder, rows_BL, len(prompt))[:, len(known) :]
        sums_B = (hidden_BT * log_p[:, np.arange(len(block)), block]).sum(axis=1)
        counts_B = hidden_BT.sum(axis=1)
        means = [sums_B[counts_B == count].mean() * len(block) / count for count in range(1, len(block) + 1)]
        total += np.mean(means)
    return total


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_estimates_are_within_two_standard_errors_of_all_masks(rule):
    model = decoder(*rule)
    found = log_likelihoods(model, PROMPTS, ANSWERS, samples=256, seed=0, batch_size=128)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        exact = enumerated(model, prompt, answer)
        assert abs(found.values[i] - exact) <= 2 * found.standard_errors[i] + 1e-4
        assert found.standard_errors[i] < 0.1 * abs(exact)
    assert found.standard_errors[1] == 0  # one token, one mask
    assert found.tokens.tolist() == [5, 1, 2]


def test_a_causal_model_is_scored_exactly():
    model = decoder("causal", True, 0)
    found = log_likelihoods(model, PROMPTS, ANSWERS)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        log_p = log_probabilities(model, np.concatenate([prompt, answer])[None], len(prompt))[0, len(prompt) :]
        assert found.values[i] == pytest.approx(log_p[np.arange(len(answer)), answer].sum(), abs=1e-4)
        assert found.standard_errors[i] == 0


class Joint:
    """A distribution over all texts of `LENGTH` tokens, whose conditionals are exact."""

    LENGTH, TOKENS = 4, 3

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.table = rng.dirichlet(np.full(self.TOKENS**self.LENGTH, 0.3)).reshape((self.TOKENS,) * self.LENGTH) + 1e-4
        self.table /= self.table.sum()

    def __call__(self, tokens_BL, masked_BL, _real_BL, _prompt_lengths_B):
        nll_BL = np.zeros(tokens_BL.shape)
        for row, (tokens, masked) in enumerate(zip(tokens_BL[:, : self.LENGTH], masked_BL, strict=True)):
            known = tuple(slice(None) if masked[i] else int(tokens[i]) for i in range(self.LENGTH))
            given = self.table[known]
            for axis, i in enumerate(np.flatnonzero(masked[: self.LENGTH])):
                marginal = given.sum(axis=tuple(a for a in range(given.ndim) if a != axis))
                nll_BL[row, i] = -np.log(marginal[tokens[i]] / marginal.sum())
        return nll_BL


def test_of_a_consistent_model_the_bound_is_the_likelihood_and_the_standard_error_is_honest():
    """Whatever the order, exact conditionals multiply to p(x). Over 300 draws deviations must be as large as stated."""
    joint, text = Joint(0), np.array([2, 0, 1, 1])
    exact, errors, deviations = np.log(joint.table[tuple(text)]), [], []
    for seed in range(300):
        found = bound(joint, [np.zeros(0, int)], [text], samples=32, seed=seed, batch_size=32)
        errors.append(found.values[0] - exact)
        deviations.append(errors[-1] / found.standard_errors[0])
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(300)  # no bias: halves are not rounded to even counts
    assert 0.75 < np.sqrt(np.mean(np.square(deviations))) < 1.2
    assert np.mean(np.abs(deviations) > 2) < 0.1


def test_mask_counts_are_spread_evenly():
    for length, samples in ((5, 10), (7, 128), (128, 32)):
        counts = mask_counts(np.random.default_rng(0), length, samples)
        assert counts.min() >= 1 and counts.max() <= length
        times = np.bincount(counts, minlength=length + 1)[1:]
        assert times.max() - times.min() <= 1
    drawn = [mask_counts(np.random.default_rng(seed), 9, 1)[0] for seed in range(900)]
    assert np.bincount(drawn, minlength=10)[1:].min() > 60  # a single sample is uniform over the counts


def test_a_row_does_not_depend_on_the_others_nor_on_the_mesh():
    model = decoder("prefix", True, 0)
    together = log_likelihoods(model, PROMPTS, ANSWERS, samples=16, batch_size=24)
    alone = log_likelihoods(model, PROMPTS[2:], ANSWERS[2:], samples=16, batch_size=7)
    assert alone.values[0] == pytest.approx(together.values[2], abs=1e-5)
    mesh = make_mesh(min(2, jax.device_count()))
    divided = model.replace(variables={"params": place(model.variables["params"], mesh)}, mesh=mesh)
    np.testing.assert_allclose(
        log_likelihoods(divided, PROMPTS, ANSWERS, samples=16).values, together.values, atol=1e-4
    )


def test_nothing_to_score_is_refused():
    with pytest.raises(UserError, match="answer 0 holds no token"):
        log_likelihoods(decoder("full", False, 0), [np.array([1])], [np.array([], int)])
    with pytest.raises(UserError, match="prompt 0 is empty"):
        log_likelihoods(decoder("full", True, 0), [np.array([], int)], [np.array([1])])
    with pytest.raises(UserError, match="samples must be a positive integer"):
        log_likelihoods(decoder("full", False, 0), PROMPTS, ANSWERS, samples=0)


def test_the_masked_copies_of_all_rows_never_exist_at_once(monkeypatch):
    """A task of lm-eval is one call of ten thousand rows and more: copies are drawn as batches need them."""
    drawn, ahead, scored = [], [], 0
    weights = likelihood._block_weights
    monkeypatch.setattr(likelihood, "_block_weights", lambda *given: drawn.append(0) or weights(*given))

    def score(tokens_BL, masked_BL, real_BL, lengths_B):
        nonlocal scored
        ahead.append(len(drawn) * 16 - scored)
        scored += len(tokens_BL)
        return np.where(masked_BL, 1.0, 0.0)

    prompts, answers = [
        [np.arange(size) for size in sizes] for sizes in ([3] * 100, [2 + row % 60 for row in range(100)])
    ]
    found = bound(score, prompts, answers, samples=16, seed=0, batch_size=8)
    assert max(ahead) <= 2 * 16 + 8 * 3  # rows that are begun, and a batch of each of three widths
    np.testing.assert_allclose(found.values, [-len(answer) for answer in answers])
    np.testing.assert_array_equal(found.tokens, [len(answer) for answer in answers])
