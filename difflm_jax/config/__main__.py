"""Prints docs/configuration.md: `python -m difflm_jax.config > docs/configuration.md`."""

from difflm_jax.config.docs import markdown

print(markdown(), end="")
