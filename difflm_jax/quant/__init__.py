"""How a weight is stored and multiplied. Layers call `matmul` and never ask how a weight is held.

`QTensor` is the one quantised weight; `nf4` and `integers` say what its codes mean, `nested` how its scales may be
quantised in turn. Nothing here knows files or models.
"""

from difflm_jax.quant.nested import NestedScales
from difflm_jax.quant.qtensor import FORMATS, QTensor, QuantConfig, dequantize, quantize

__all__ = [
    "FORMATS",
    "NestedScales",
    "QTensor",
    "QuantConfig",
    "dequantize",
    "quantize",
]
