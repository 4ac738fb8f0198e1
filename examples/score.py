"""Scores answers by their likelihood: the diffusion model's Monte-Carlo bound next to its causal base's exact value.

python examples/score.py MODEL [ADAPTER]
"""

import sys

import difflm_jax

PROMPTS = ["What is the capital of Italy?"] * 2
ANSWERS = ["The capital of Italy is Rome.", "The capital of Italy is Madrid."]

lm = difflm_jax.load(sys.argv[1], adapter=sys.argv[2] if len(sys.argv) > 2 else None, dtype="auto")
bound = lm.log_likelihood(PROMPTS, ANSWERS, samples=32)
exact = lm.base().log_likelihood(PROMPTS, ANSWERS)
for answer, value, error, base in zip(ANSWERS, bound.values, bound.standard_errors, exact.values, strict=True):
    print(f"{answer}  diffusion at least {value:.2f} ± {error:.2f} nats, base {base:.2f}")
