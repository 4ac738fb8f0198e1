"""Fills gaps in the middle of a text: exactly the mask tokens are replaced.

python examples/infill.py MODEL [ADAPTER]
"""

import sys

import difflm_jax

lm = difflm_jax.load(sys.argv[1], adapter=sys.argv[2] if len(sys.argv) > 2 else None, dtype="auto")
mask = lm.tokenizer.mask_token
text = f"The capital of Italy is{mask * 2}, a city in{mask * 2}."
print(text)
print(lm.infill(text, steps=4).texts[0])
