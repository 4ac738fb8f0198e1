"""Reads experts in MXFP4 from gpt-oss checkpoints (OCP Microscaling Formats 1.0, section 5.2).

A tensor is stored as `NAME_blocks` uint8 [X, out, in / 32, 16] and `NAME_scales` uint8 [X, out, in / 32]. A byte has
two values of 4 bits (e2m1), the lower half first. The scale of 32 values is 2^(byte - 127).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from difflm_jax.checkpoint.safetensors import FLOAT_DTYPES, TensorFiles, open_shards

_BLOCKS, _SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
_BIAS = 127


def is_mxfp4(quantization_config: Any) -> bool:
    """Whether a `quantization_config` declares MXFP4."""
    return isinstance(quantization_config, Mapping) and quantization_config.get("quant_method") == "mxfp4"


class Mxfp4:
    """A tensor [X, in, out]. `[x]` decodes one expert to bfloat16, which represents all MXFP4 values exactly."""

    def __init__(self, blocks: np.ndarray, scales: np.ndarray):
        self._blocks, self._scales = blocks, scales

    def __getitem__(self, expert: int) -> np.ndarray:
        blocks = self._blocks[expert]
        values = np.stack([_VALUES[blocks & 15], _VALUES[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], -1)
        values = np.ldexp(values, self._scales[expert].astype(np.int32)[..., None] - _BIAS)
        return values.reshape(len(blocks), -1).astype(jnp.bfloat16).T


def open_mxfp4(directory: Path) -> TensorFiles:
    """Opens the tensors of a model directory. Those in MXFP4 have the shape [X, in, out] and are read as `Mxfp4`."""
    files = open_shards(directory, dtypes=(*FLOAT_DTYPES, "U8"))
    shapes, packed = dict(files.shapes), set()
    for name, blocks in files.shapes.items():
        whole = name.removesuffix(_BLOCKS)
        if whole != name and len(blocks) == 4 and files.shapes.get(whole + _SCALES) == blocks[:3]:
            del shapes[name], shapes[whole + _SCALES]
            shapes[whole] = (blocks[0], 2 * blocks[2] * blocks[3], blocks[1])
            packed.add(whole)

    def read(name: str) -> Any:
        return Mxfp4(files.read(name + _BLOCKS), files.read(name + _SCALES)) if name in packed else files.read(name)

    return dataclasses.replace(files, shapes=shapes, read=read)
