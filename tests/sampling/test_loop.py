"""The sampler on rigged denoisers: what it commits, when, and what it must never touch."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflm_jax.sampling import commit, schedule
from difflm_jax.sampling.loop import Plan
from tests.sampling.rigged import EOS, MASK, VOCABULARY, Rigged, rows, run

# Every way of decoding, once.
WAYS = {
    "original": {"algorithm": "confidence"},
    "probability": {},
    "random": {"algorithm": "random"},
    "origin": {"algorithm": "origin"},
    "dream": {"algorithm": "entropy", "schedule": "dream"},
    "dream-drawn": {"algorithm": "topk_margin", "schedule": "dream", "alg_temp": 0.5, "temperature": 0.9, "top_p": 0.8},
    "dllm": {"schedule": "dllm", "temperature": 1.0, "top_k": 3},
    "threshold": {"threshold": 0.4},
    "leftmost": {"threshold": 0.4, "leftmost": True, "schedule": "deadline"},
    "leftmost-factor": {"factor": 1.0, "leftmost": True},
    "deadline": {"schedule": "deadline"},
    "factor": {"factor": 1.0, "temperature": 0.7},
    "entropy-bound": {"entropy_bound": 0.7},
    "remdm-cap": {"remask": "cap", "remask_eta": 0.3, "temperature": 1.0},
    "remdm-rescale": {"remask": "rescale", "remask_eta": 0.5},
    "remdm-conf": {"remask": "conf", "temperature": 1.0},
    "edit": {"threshold": 0.3, "edit_threshold": 0.3},
    "penalties": {"repetition_penalty": 1.5, "eos_penalty": 2.0, "eos_last": True},
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
PLANS = [Plan(2, 1, 9, 4), Plan(1, 3, 4, 4)]


def length(plan):
    return plan.first_column + plan.num_blocks * plan.block_length


def table(values):
    """Returns a denoiser with these logits [L, V] for any tokens."""
    denoiser = Rigged(len(values), 0, mix=False)
    denoiser.head, denoiser.bias = np.zeros_like(denoiser.head), np.asarray(values, np.float64)
    return denoiser


@ways
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_only_masks_change_every_mask_is_filled_and_the_mask_is_never_an_output(options, data):
    plan = data.draw(st.sampled_from(PLANS))
    seed = data.draw(st.integers(0, 10_000))
    denoiser = Rigged(length(plan), seed)
    denoiser.bias[:, MASK] += 50.0  # a model that loves its mask token
    tokens = rows(seed, 3, plan.first_column, length(plan) - plan.first_column, 0.7)
    fillable = (tokens == MASK) & (np.random.default_rng(seed).random(tokens.shape) < 0.8)
    carry = run(denoiser, tokens, plan, seed=seed, fillable=fillable, stop_at_eos=False, **options)
    out = np.asarray(carry.tokens)
    assert (out[~fillable] == tokens[~fillable]).all()
    assert (out[fillable] != MASK).all()
    assert (np.asarray(carry.confidence)[fillable] > 0).all()
    assert not np.asarray(carry.confidence)[~fillable].any()


@ways
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_is_the_same_alone_and_in_any_batch(options, data):
    plan, seed = PLANS[1], data.draw(st.integers(0, 10_000))
    denoiser = Rigged(length(plan), seed)
    tokens = rows(seed, 3, plan.first_column, length(plan) - plan.first_column, 0.8)
    together = run(denoiser, tokens, plan, seed=seed, stop_at_eos=False, **options)
    for i in range(3):
        alone = run(denoiser, tokens[i : i + 1], plan, seed=seed, stop_at_eos=False, **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        assert int(alone.passes[0]) == int(together.passes[i])


@ways
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_denoiser_of_the_position_alone_is_read_off_without_a_shift(options, plan):
    """Whatever the order, position i ends with its own likeliest token: nothing is stranded, nothing is off by one."""
    if options.get("temperature") or options.get("repetition_penalty"):
        pytest.skip("draws, or looks at the other tokens")
    values = np.full((length(plan), VOCABULARY), -5.0)
    expected = np.arange(length(plan)) % EOS
    values[np.arange(length(plan)), expected] = np.linspace(1, 2, length(plan))
    tokens = np.full((3, length(plan)), MASK)
    tokens[:, : plan.first_column] = 8
    out = np.asarray(run(table(values), tokens, plan, stop_at_eos=False, **options).tokens)
    np.testing.assert_array_equal(out[:, plan.first_column :], np.tile(expected[plan.first_column :], (3, 1)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(PLANS), st.integers(0, 10_000), st.sampled_from(["confidence", "probability", "entropy"]))
def test_committed_tokens_stay(plan, seed, algorithm):
    """Tokens that one block leaves are unchanged after all blocks."""
    denoiser, tokens = Rigged(length(plan), seed), rows(seed, 3, plan.first_column, length(plan) - plan.first_column)
    final = np.asarray(run(denoiser, tokens, plan, algorithm=algorithm, stop_at_eos=False).tokens)
    one = dataclasses.replace(plan, num_blocks=1)
    first = np.asarray(run(denoiser, tokens, one, algorithm=algorithm, stop_at_eos=False).tokens)
    end = plan.first_column + plan.block_length
    assert (first[:, plan.first_column : end] != MASK).all()
    assert (first[:, end:] == MASK).all()
    np.testing.assert_array_equal(first[:, :end], final[:, :end])


def test_masks_behind_a_committed_eos_stay():
    values = np.zeros((6, VOCABULARY))
    values[:, 1] = 1.0
    values[2, EOS] = 50.0
    carry = run(table(values), [[MASK] * 6], Plan(0, 1, 6, 6), algorithm="confidence")
    assert np.asarray(carry.tokens)[0].tolist() == [1, 1, EOS, MASK, MASK, MASK]
    assert int(carry.passes[0]) == 3
    unstopped = run(table(values), [[MASK] * 6], Plan(0, 1, 6, 6), stop_at_eos=False)
    assert np.asarray(unstopped.tokens)[0].tolist() == [1, 1, EOS, 1, 1, 1]


def test_the_loop_ends_with_the_last_row_that_has_masks():
    values = np.zeros((6, VOCABULARY))
    values[:, 1] = 1.0
    values[3, EOS] = 50.0
    carry = run(table(values), [[2, MASK, MASK, MASK, MASK, MASK], [2, 3, 3, MASK, MASK, MASK]], Plan(1, 1, 5, 5))
    assert np.asarray(carry.passes).tolist() == [3, 1]
    assert carry.step.tolist() == [0, 0]
    assert carry.block.tolist() == [1, 1]


def test_an_eos_in_the_prompt_does_not_end_the_answer():
    values = np.zeros((5, VOCABULARY))
    values[:, 1] = 1.0
    carry = run(table(values), [[EOS, EOS, MASK, MASK, MASK]], Plan(2, 1, 3, 3))
    assert np.asarray(carry.tokens)[0].tolist() == [EOS, EOS, 1, 1, 1]


def test_eos_penalty_and_eos_last():
    values = np.zeros((4, VOCABULARY))
    values[:, 1], values[:, EOS] = 1.0, 3.0
    canvas, plan = [[MASK] * 4], Plan(0, 1, 4, 4)
    assert np.asarray(run(table(values), canvas, plan).tokens)[0].tolist() == [EOS, MASK, MASK, MASK]
    for penalty in (2.5, float("inf")):
        assert np.asarray(run(table(values), canvas, plan, eos_penalty=penalty).tokens)[0].tolist() == [1, 1, 1, 1]
    values[:2, EOS] = 0.0
    assert np.asarray(run(table(values), canvas, plan).tokens)[0].tolist()[2] == EOS
    last = run(table(values), canvas, plan, eos_last=True)
    assert np.asarray(last.tokens)[0].tolist() == [1, 1, EOS, MASK]
    assert int(last.passes[0]) == 3


def test_repetition_penalty_is_that_of_the_definition():
    """Three columns in turn. 3 occurs in the prompt: its logit is divided if positive, multiplied if negative."""
    values = np.full((4, VOCABULARY), -9.0)
    values[1, 3], values[1, 4] = 2.0, 1.5  # 2 / 1.5 < 1.5: the penalty changes the choice
    values[2, 3], values[2, 4] = -1.0, -1.2  # -1 * 1.5 < -1.2 * 1.5, unless 4 was committed in column 1
    values[3, 3], values[3, 5] = -1.0, -1.6  # -1 * 1.5 > -1.6
    canvas, plan = [[3, MASK, MASK, MASK]], Plan(1, 3, 1, 1)
    assert np.asarray(run(table(values), canvas, plan).tokens)[0, 1:].tolist() == [3, 3, 3]
    assert np.asarray(run(table(values), canvas, plan, repetition_penalty=1.5).tokens)[0, 1:].tolist() == [4, 3, 3]
    assert np.asarray(run(table(values), canvas, plan, repetition_penalty=1.7).tokens)[0, 1:].tolist() == [4, 3, 5]


def test_ties_commit_exactly_the_quota_from_the_left():
    open_BT = jnp.array([[True, False, True, True, True, True]])
    for score in (jnp.zeros((1, 6)), jnp.full((1, 6), -jnp.inf), jnp.full((1, 6), jnp.inf)):
        chosen = commit.most_confident(score, open_BT, jnp.array([3]))
        assert np.asarray(chosen)[0].tolist() == [True, False, True, True, False, False]


def test_probabilities_that_float32_rounds_to_one_are_still_ranked():
    """EOS of probability 1 - 1e-9 in column 0, a token of 1 - 1e-12 in column 1: the latter is committed first."""
    values = np.full((2, VOCABULARY), -1e4)
    values[0, EOS], values[0, 2] = 20.72, 0.0
    values[1, 1], values[1, 2] = 27.63, 0.0
    assert np.float32(1 - 1e-9) == np.float32(1 - 1e-12) == 1.0
    carry = run(table(values), [[MASK, MASK]], Plan(0, 1, 2, 2))
    assert np.asarray(carry.tokens)[0].tolist() == [EOS, 1]  # otherwise EOS first, and column 1 left alone


@pytest.mark.parametrize(("masks", "steps"), [(10, 4), (3, 5), (0, 2), (128, 128), (7, 16)])
@pytest.mark.parametrize("name", sorted(set(schedule.SCHEDULES) - {schedule.DEADLINE}))
def test_every_schedule_spends_every_mask(name, masks, steps):
    quotas = schedule.SCHEDULES[name](masks, steps)
    assert len(quotas) == steps
    assert sum(quotas) == masks
    assert min(quotas) >= 0


def test_even_quotas_have_the_remainder_first():
    assert schedule.even(10, 4) == [3, 3, 2, 2]
    assert schedule.even(3, 5) == [1, 1, 1, 0, 0]


def test_more_steps_than_masks_are_more_thoughts_for_remasking():
    """ReMDM uses every step it is given; the schedule of the original system stops when nothing is left."""
    denoiser, tokens = Rigged(7, 1), rows(1, 2, 2, 5)
    plan = Plan(2, 1, 5, 20)
    assert np.asarray(run(denoiser, tokens, plan, stop_at_eos=False).passes).tolist() == [5, 5]
    remasked = run(denoiser, tokens, plan, remask="cap", remask_eta=0.2, stop_at_eos=False)
    assert np.asarray(remasked.passes).tolist() == [20, 20]


def test_copies_of_a_row_draw_differently():
    draw = functools.partial(run, Rigged(6, 0, mix=False, scale=0.5), plan=Plan(1, 1, 5, 5), temperature=1.0)
    batch = np.asarray(draw([[2] + [MASK] * 5, [3] + [MASK] * 5, [3] + [MASK] * 5]).tokens)
    assert (batch[1] != batch[2]).any()


def test_leftmost_alone_is_greedy_decoding_from_left_to_right():
    """One a pass: the committed positions come in their order, whatever the scores are."""
    plan, seed = Plan(2, 1, 6, 6), 4
    denoiser = Rigged(length(plan), seed)
    tokens = np.full((1, length(plan)), MASK)
    tokens[:, :2] = 1
    carry = run(denoiser, tokens, plan, seed=seed, leftmost=True, stop_at_eos=False)
    for position in range(2, length(plan)):
        logits = denoiser(torch.tensor(tokens[0]))[position].numpy()
        logits[MASK] = -np.inf
        tokens[0, position] = logits.argmax()
    np.testing.assert_array_equal(carry.tokens, tokens)


def test_a_deadline_gives_the_passes_that_are_saved_to_what_is_unsure():
    """Of 9 masks in 4 passes: 3 at first (ceil 9/4); if a rule takes 7 then 1, 1; the last takes all that is left."""
    quota = commit.deadline_quota(jnp.array([[True] * 9, [True] * 2 + [False] * 7]), jnp.array([4, 4]))
    np.testing.assert_array_equal(quota, [3, 1])
    np.testing.assert_array_equal(commit.deadline_quota(jnp.ones((1, 9), bool), jnp.array([1])), [9])


def test_a_block_may_take_the_passes_that_earlier_ones_have_saved():
    """A confident block that used one of two passes leaves three to the next; one that used both, two.

    A block without a mask has no passes to leave.
    """
    values = np.zeros((8, VOCABULARY))
    values[:4, 1] = 50.0
    values[4:, 2] = np.linspace(1.0, 2.0, 4)
    plan, masks = Plan(0, 2, 4, 2), [MASK] * 4
    rule = {"threshold": 0.9, "schedule": "deadline", "stop_at_eos": False}
    carry = run(table(values), [[*masks, *masks], [1] * 4 + masks], plan, **rule)
    np.testing.assert_array_equal(carry.passes, [4, 2])
    unsure = np.roll(values, 4, axis=0)
    np.testing.assert_array_equal(run(table(unsure), [[*masks, *masks]], plan, **rule).passes, [3])
    np.testing.assert_array_equal(run(table(values), [[*masks, *masks]], plan, threshold=0.9).passes, [3])
    edited = run(table(values), [[*masks, *masks]], plan, **rule, edit_threshold=0.5)
    assert (np.asarray(edited.tokens) != MASK).all()


def test_the_leftmost_open_mask_comes_first_in_every_rule():
    score, opened = jnp.array([[9.0, -3.0, 5.0, 4.0]]), jnp.array([[False, True, True, True]])
    first = commit.leftmost_first(score, opened)
    two = jnp.array([2])
    np.testing.assert_array_equal(commit.most_confident(first, opened, two)[0], [False, True, True, False])
    np.testing.assert_array_equal(commit.above_threshold(first, opened, two // 2, 0.99)[0], [False, True, True, False])
    np.testing.assert_array_equal(commit.within_factor(first, opened, two // 2, 0.001)[0], [False, True, False, False])
    entropy = commit.leftmost_first(jnp.array([[0.0, -3.0, -0.5, -0.4]]), opened)
    np.testing.assert_array_equal(commit.within_entropy(entropy, opened, two // 2, 0.3)[0], [False, True, False, True])
