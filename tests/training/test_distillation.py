"""Distillation from the base and states of the model's own decoding, in the loss of a whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import Corruption, corrupt
from difflm_jax.diffusion.extras.on_policy import on_policy_states
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.objective import loss_sums
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.ops.cross_entropy import Scores
from tests.tiny import hidden_states
from tests.training.test_block_diffusion import (
    CONFIG,
    LENGTH,
    LENGTHS,
    LORA_CONFIG,
    MASK,
    PARAMS,
    PROMPTS,
    batch,
    random_lora,
)

EOS = 3
KEY = jax.random.key(5)
RULE = Corruption(
    DiffusionConfig("prefix", logit_shift=True, mask_token_id=MASK),
    scope="answer",
    mask_rate="row",
    loss=LossRule("masked", eos_token_id=EOS),
    min_rate=0.5,
    max_rate=0.9,
    extras=Extras(distillation=0.6),
)
MODEL = Transformer(CONFIG, lora=LORA_CONFIG, mask_token_id=MASK)
VALID = np.arange(LENGTH) < LENGTHS[:, None]


def with_extras(rule, **changes):
    return dataclasses.replace(rule, extras=dataclasses.replace(rule.extras, **changes))


def rows_with_eos():
    """The first answer ends in three EOS tokens, of which two only fill it up."""
    rows = batch()
    return rows.replace(tokens=rows.tokens.at[0, 11:14].set(EOS))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model, rule, lora, rows):
    def loss(lora):
        return loss_sums(model, {"params": PARAMS, "lora": lora}, rows, KEY, rule, 8, False)

    return jax.value_and_grad(loss, has_aux=True)(lora)


@functools.partial(jax.jit, static_argnums=(0, 2))
def log_probabilities(diffusion, tokens, with_lora):
    lora = random_lora() if with_lora else None
    variables = {"params": PARAMS} if lora is None else {"params": PARAMS, "lora": lora}
    model = MODEL if with_lora else MODEL.clone(lora=None)
    hidden = hidden_states(model, diffusion, variables, tokens, VALID, jnp.asarray(PROMPTS, jnp.int32))
    logits = head_logits(CONFIG, PARAMS, None, None, hidden).at[..., MASK].set(-jnp.inf)
    return jax.nn.log_softmax(logits)


def test_the_loss_adds_the_divergence_from_the_causal_base_at_hidden_tokens():
    """CE + weight * KL(p(x_i | x_<i) || model), but for tokens that only fill an answer up; the base has no adapter."""
    rows = rows_with_eos()
    (loss, sums), _ = run(MODEL, RULE, random_lora(), rows)
    noisy = corrupt(KEY, rows, RULE)
    masked = np.asarray(noisy.masked)
    assert masked[0, 12:14].any()
    own = np.asarray(log_probabilities(RULE.diffusion, noisy.tokens, True))
    taught = np.asarray(log_probabilities(RULE.diffusion.causal(), rows.tokens, False))
    expected = 0.0
    for row, i in np.argwhere(masked):
        expected -= own[row, i - 1, rows.tokens[row, i]]
        if not (row == 0 and i > 11):
            q, p = np.delete(taught[row, i - 1], MASK), np.delete(own[row, i - 1], MASK)
            expected += 0.6 * float((np.exp(q) * (q - p)).sum())
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(sums.weight) == masked.sum()


def test_a_model_that_is_its_own_teacher_has_no_divergence_and_no_further_gradient():
    """Block length 1 with the shift and without an adapter is the base: nothing is added, nor to its gradient."""
    one = dataclasses.replace(RULE.diffusion, attention="block", block_length=1)
    rule = dataclasses.replace(RULE, diffusion=one, mask_rate="block")
    fresh = jax.tree.map(jnp.zeros_like, random_lora())
    (loss, _), gradient = run(MODEL, rule, fresh, batch())
    (plain, _), expected = run(MODEL, dataclasses.replace(rule, extras=Extras()), fresh, batch())
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(np.abs(b).max()) + 1e-6)


def policy_states(rule, rows, passes=1):
    """(random masks, states of decoding, log p that a whole-softmax pass over the hidden answer gives)."""
    rule = with_extras(rule, on_policy=1.0, on_policy_passes=passes)
    noisy = corrupt(KEY, rows, rule)
    own = []

    def score(state, weights_BL):
        log_p = log_probabilities(RULE.diffusion, state.tokens, True)
        log_p = jnp.roll(log_p, 1, axis=1)
        own.append(log_p)
        zero = jnp.zeros_like(weights_BL)
        return 0.0, Scores(zero, zero, log_p.max(axis=-1), zero, log_p.argmax(axis=-1).astype(jnp.int32))

    draws = jnp.zeros((3, LENGTH))  # below every share
    return noisy, on_policy_states(draws, noisy, noisy.segments, score, rule), own


@pytest.mark.parametrize("passes", [1, 2])
def test_what_stays_hidden_is_what_the_model_is_least_sure_of(passes):
    rows = rows_with_eos()
    noisy, state, seen = policy_states(RULE, rows, passes)
    candidates = np.asarray(noisy.candidates)
    hidden = candidates
    for index, log_p in enumerate(seen):
        best = np.asarray(log_p).max(axis=-1)
        following = np.zeros_like(hidden)
        for row in range(3):
            total = candidates[row].sum()
            target = max(1, round(float(noisy.rates[row, 0]) * total))
            left = round(total - (total - target) * (index + 1) / passes)
            order = sorted(np.flatnonzero(hidden[row]), key=lambda i: best[row, i])
            following[row, order[:left]] = True
        hidden = following
    np.testing.assert_array_equal(state.masked, hidden)
    np.testing.assert_array_equal(state.tokens, np.where(hidden, MASK, rows.tokens))
    np.testing.assert_array_equal(state.weights, hidden)


def test_a_row_that_its_own_tokens_lead_away_is_judged_by_the_teacher_alone():
    """Random weights never say the reference: with committed tokens of its own a row has no target left."""
    rule = with_extras(RULE, on_policy_tokens="own")
    noisy, state, (log_p,) = policy_states(rule, rows_with_eos())
    masked, candidates = np.asarray(state.masked), np.asarray(noisy.candidates)
    choice = np.asarray(log_p).argmax(axis=-1)
    np.testing.assert_array_equal(state.clean, np.where(candidates, choice, noisy.clean))
    np.testing.assert_array_equal(state.tokens, np.where(masked, MASK, state.clean))
    assert (candidates & ~masked).any(axis=1).all()
    assert not np.asarray(state.weights).any()
    is_eos = candidates & (choice == EOS)
    ended = np.cumsum(is_eos, axis=1) - is_eos > 0
    np.testing.assert_allclose(state.teacher_weights, 0.6 * (masked & ~ended), rtol=1e-6)
    np.testing.assert_array_equal(state.counts, masked)


def test_states_of_decoding_train_the_whole_step():
    rule = with_extras(RULE, on_policy=1.0, on_policy_tokens="own", on_policy_passes=2)
    (loss, sums), gradient = run(MODEL, rule, random_lora(), rows_with_eos())
    (plain, _), _ = run(MODEL, RULE, random_lora(), rows_with_eos())
    assert np.isfinite(loss) and float(loss) != float(plain)
    assert float(sums.weight) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
