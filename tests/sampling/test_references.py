"""Token for token the decoding rules of the papers at temperature 0, over the same logits: tests/oracles/samplers.py.

Rows of a batch have prompts and gaps of their own; the references run one row at a time, so these are tests of the
independence of rows as well. Passes are compared too.
"""

import numpy as np
import pytest
import torch

from difflm_jax.sampling.loop import Plan
from tests.oracles import samplers as oracle
from tests.sampling.rigged import MASK, Rigged, rows, run

# (prompt, blocks, block length, steps a block)
SHAPES = [(3, 1, 12, 12), (2, 1, 12, 5), (4, 3, 4, 2), (1, 2, 6, 6), (2, 6, 2, 1), (5, 1, 7, 3), (0, 2, 8, 3)]
SEEDS = range(4)


def compare(expected_of, shape, seed, masked=1.0, **options):
    """Runs a batch of three rows and compares each with `expected_of(denoiser, row)` -> (tokens, passes)."""
    prompt, blocks, block, steps = shape
    denoiser = Rigged(prompt + blocks * block, seed)
    tokens = rows(seed, 3, prompt, blocks * block, masked)
    carry = run(denoiser, tokens, Plan(prompt, blocks, block, steps), stop_at_eos=False, **options)
    for i, row in enumerate(tokens):
        expected, passes = expected_of(denoiser, torch.tensor(row))
        assert np.asarray(carry.tokens[i]).tolist() == expected.tolist()
        assert int(carry.passes[i]) == passes


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masked", [1.0, 0.6])
@pytest.mark.parametrize("algorithm", ["probability", "confidence"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_llada(shape, algorithm, masked, seed):
    prompt, blocks, block, steps = shape
    compare(
        lambda denoise, row: oracle.llada(denoise, row, prompt, block, steps * blocks, MASK, algorithm),
        shape,
        seed,
        masked,
        algorithm=algorithm,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.7}, {"top_k": 3}, {"top_p": 0.9, "top_k": 4}], ids=str)
@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(("prompt", "length", "steps"), [(3, 12, 5), (1, 10, 24), (0, 9, 9)])
def test_dream(prompt, length, steps, algorithm, filters, seed):
    compare(
        lambda denoise, row: oracle.dream(denoise, row, prompt, steps, MASK, algorithm, **filters),
        (prompt, 1, length, steps),
        seed,
        masked=0.8,
        algorithm=algorithm,
        schedule="dream",
        **filters,
    )


RULES = {
    "threshold": (oracle.threshold_rule, "probability", (0.05, 0.3, 0.6, 0.99)),  # Fast-dLLM
    "factor": (oracle.factor_rule, "probability", (0.3, 1.0, 2.5)),  # Fast-dLLM
    "entropy_bound": (oracle.entropy_rule, "entropy", (0.0, 0.8, 3.0)),  # EB-Sampler
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name in RULES for value in RULES[name][2]])
def test_rules_that_vary_the_steps(name, value, shape, seed):
    prompt, blocks, block, _ = shape
    rule, algorithm, _ = RULES[name]
    compare(
        lambda denoise, row: oracle.fast_dllm(
            denoise, row, prompt, block, MASK, lambda c, allowed: rule(c, allowed, value), algorithm
        ),
        (prompt, blocks, block, block),
        seed,
        **{name: value},
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masked", [1.0, 0.5])
@pytest.mark.parametrize(("tau", "edit_tau", "passes"), [(0.3, 0.2, 16), (0.1, 0.35, 2), (0.9, 0.0, 3)])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_llada21_editing(shape, tau, edit_tau, passes, masked, seed):
    prompt, blocks, block, _ = shape
    compare(
        lambda denoise, row: oracle.llada21(denoise, row, prompt, block, MASK, tau, edit_tau, passes),
        (prompt, blocks, block, block),
        seed,
        masked,
        threshold=tau,
        edit_threshold=edit_tau,
        edit_passes=passes,
    )


def test_editing_changes_tokens_that_were_committed_and_none_that_were_given():
    changed = 0
    for seed in range(10):
        denoiser, tokens = Rigged(13, seed), rows(seed, 3, 3, 10, 0.7)
        plan = Plan(3, 1, 10, 10)
        plain = np.asarray(run(denoiser, tokens, plan, threshold=0.2, stop_at_eos=False).tokens)
        edited = np.asarray(run(denoiser, tokens, plan, threshold=0.2, edit_threshold=0.3, stop_at_eos=False).tokens)
        changed += (plain != edited).sum()
        assert (edited[tokens != MASK] == tokens[tokens != MASK]).all()
    assert changed > 5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("length", "steps"), [(12, 12), (12, 5), (7, 3), (10, 16), (5, 2)])
def test_dllm_schedule(length, steps, seed):
    """LLaDA's loop with the quotas of dLLM."""

    def expected(denoise, row):
        row, passes = row.clone(), 0
        for k in oracle.dllm_quota(int((row == MASK).sum()), steps):
            logits = oracle.forbid(denoise(row), MASK)
            for i in oracle.best(oracle.score("probability", logits), row == MASK, k):
                row[i] = logits[i].argmax()
            passes += 1
        return row, passes

    compare(expected, (2, 1, length, steps), seed, masked=0.8, schedule="dllm")
