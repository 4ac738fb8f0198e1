"""Quantised weights: formats, packing and dequantisation. Layers call `ops.matmul`, whatever the format of a weight.

`QTensor` is the only quantised weight. `nf4` and `integers` define its codes; `nested` quantises its scales. Nothing
here knows files or models.
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
