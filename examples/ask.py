"""Asks a converted model a few questions, and says how many forward passes each answer took.

python examples/ask.py MODEL [ADAPTER]     # after the quickstart: the .gguf file and runs/quickstart/sft_model
"""

import sys

import difflm_jax

QUESTIONS = ["What is the capital of Italy?", "What is the opposite of hot?"]

lm = difflm_jax.load(sys.argv[1], adapter=sys.argv[2] if len(sys.argv) > 2 else None, dtype="auto")
out = lm.generate(QUESTIONS, max_new_tokens=16, steps=16)
for question, text, passes in zip(QUESTIONS, out.texts, out.steps, strict=True):
    print(f"{question}  ->  {text!r} in {passes} passes")
