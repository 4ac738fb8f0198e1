"""Turns a causal language model into a masked-diffusion language model on JAX.

Shape letters used as suffixes everywhere: B batch, L sequence (T query, S key), D model, H heads, K key-value heads,
E head dimension, F MLP, V vocabulary, N layers, R LoRA rank, M scored positions, G quantisation group, C chunk.
"""

import os

# transformers announces that PyTorch is missing; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from difflm_jax.errors import UserError
from difflm_jax.lm import Generation, LanguageModel
from difflm_jax.loading import load

__all__ = ["Generation", "LanguageModel", "UserError", "load"]
