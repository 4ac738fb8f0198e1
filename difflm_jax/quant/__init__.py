"""Quantised weights: formats, packing and dequantisation. Layers call `ops.matmul` for weights of every format.

`QTensor` is the only quantised weight. `nf4` and `integers` define its codes; `nested` quantises its scales. Nothing
here depends on files or models.
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
