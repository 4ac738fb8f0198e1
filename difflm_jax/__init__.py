"""Turns a causal language model into a masked-diffusion language model on JAX.

Shape letters used as suffixes everywhere: B batch, L sequence (T query, S key), D model, H heads, K key-value heads,
E head dimension, F MLP, V vocabulary, N layers, R LoRA rank, M scored positions, G quantisation group, C chunk,
J block of an answer, P pass of a block.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Only the tokenizers of transformers are used here, so its notice that PyTorch is missing is silenced.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from difflm_jax.errors import UserError
    from difflm_jax.lm import Generation, LanguageModel
    from difflm_jax.loading import load
    from difflm_jax.sampling.grammar.grammar import Grammar

__all__ = ["Generation", "Grammar", "LanguageModel", "UserError", "load"]

_HOMES = {
    "Generation": "lm",
    "Grammar": "sampling.grammar.grammar",
    "LanguageModel": "lm",
    "UserError": "errors",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `difflm --help` does not wait for jax."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
