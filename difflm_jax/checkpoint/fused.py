"""Splits tensors that fuse several of our projections, as if the checkpoint had each of them."""

import dataclasses

import numpy as np

from difflm_jax.checkpoint.safetensors import TensorFiles
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.weights import joined_rows
from difflm_jax.quant import QTensor


def split_fused(files: TensorFiles, config: ModelConfig) -> TensorFiles:
    """Returns `files` with the parts of every fused tensor in its place. One of an unexpected shape is unchanged.

    Raises `UserError` if a fused tensor is quantised.
    """
    parts: dict[str, tuple[str, slice]] = {}
    shapes = dict(files.shapes)
    for rows in joined_rows(config):
        if not rows[0].fused or rows[0].experts:
            continue
        sizes = [row.shape[0] for row in rows]
        for layer, whole in enumerate(rows[0].fused_names):
            if whole in files.stored:
                raise UserError(f"{whole} is quantised, and cannot be split; give the unquantised checkpoint")
            if shapes.get(whole) != (sum(sizes), *rows[0].shape[1:]):
                continue
            del shapes[whole]
            for row, end in zip(rows, np.cumsum(sizes), strict=True):
                name = row.hf_names[layer]
                shapes[name], parts[name] = row.shape, (whole, slice(int(end) - row.shape[0], int(end)))

    def read(name: str) -> np.ndarray | QTensor:
        if name not in parts:
            return files.read(name)
        whole, rows = parts[name]
        return files.read(whole)[rows]

    return dataclasses.replace(files, shapes=shapes, read=read) if parts else files
