"""The transformer: its configuration, RoPE, attention rules and Linen modules.

Knows nothing of diffusion, files or training. Shape letters are those of `difflm_jax`.
"""
