"""How a frozen weight is stored and multiplied. Layers call `matmul` and never ask how a weight is held."""

from difflm_jax.quant.matmul import matmul

__all__ = ["matmul"]
