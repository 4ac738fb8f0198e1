"""Prints an answer after every forward pass, with the tokens that the pass committed.

python examples/watch.py MODEL [ADAPTER]
"""

import sys

import difflm_jax
from difflm_jax.sampling.watch import Pass

lm = difflm_jax.load(sys.argv[1], adapter=sys.argv[2] if len(sys.argv) > 2 else None, dtype="auto")


def show(seen: Pass) -> None:
    """One line per pass."""
    new = lm.tokenizer.convert_ids_to_tokens(seen.tokens[0][seen.written[0]].tolist())
    left = int((seen.tokens[0] == lm.mask_token_id).sum())
    print(f"pass {seen.number}: {new}, {left} masks left")


print(lm.generate("What is the capital of Italy?", max_new_tokens=16, steps=8, on_pass=show).texts[0])
