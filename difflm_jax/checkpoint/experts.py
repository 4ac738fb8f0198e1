"""Splits the routed experts of a checkpoint into one tensor per expert, and joins them again.

A checkpoint has a tensor for each expert, or one for all experts of a layer. In transformers 5's memory, the latter are
gate and up fused [X, 2F, D] and down [X, D, F]; gpt-oss has interleaved gate and up [X, D, 2F] and down [X, F, D].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from difflm_jax.checkpoint.safetensors import TensorFiles
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.experts import Experts
from difflm_jax.models.weights import Row, table

_MEMORY = {"gate_proj": "experts.gate_up_proj", "up_proj": "experts.gate_up_proj", "down_proj": "experts.down_proj"}


def split_experts(files: TensorFiles, config: ModelConfig) -> TensorFiles:
    """Returns `files` with a tensor per expert in place of tensors with all experts of a layer.

    Names that transformers uses in memory become those of checkpoints. A tensor of an unexpected shape is unchanged.
    Raises `UserError` if a tensor to split is quantised.
    """
    experts = config.experts
    files = _renamed(files, experts)
    shapes, parts = dict(files.shapes), {}
    read_whole = functools.lru_cache(maxsize=1)(files.read)  # its parts are read one after another
    for row in (row for row in table(config) if row.experts):
        for layer, name_of in _names(row):
            whole = next((name for name in _wholes(row, layer, experts) if name in files.shapes), None)
            if whole is None or files.shapes[whole] != _whole_shape(row, experts):
                continue
            if whole in files.stored:
                raise UserError(f"{whole} is quantised, and cannot be split; give the unquantised checkpoint")
            shapes.pop(whole, None)
            for expert, name in enumerate(name_of):
                shapes[name] = row.shape
                parts[name] = functools.partial(_part, row, experts, functools.partial(read_whole, whole), expert)

    def read(name: str) -> Any:
        return parts[name]() if name in parts else files.read(name)

    return dataclasses.replace(files, shapes=shapes, read=read) if parts else files


def join_experts(experts: Experts, leaves: Sequence[np.ndarray], is_weight: bool) -> np.ndarray:
    """Joins `leaves` of our tree, weights [X, out, in] or biases [X, out], into one tensor of a layer."""
    if experts.names.stored != "interleaved":
        return np.concatenate(leaves, axis=1)
    joined = np.stack(leaves, axis=2)  # [X, out, parts, ...]
    joined = joined.reshape(len(joined), -1, *joined.shape[3:])
    return np.ascontiguousarray(np.swapaxes(joined, 1, 2) if is_weight else joined)


def _names(row: Row) -> list[tuple[int, list[str]]]:
    names = row.hf_names
    return [(layer, names[i * row.experts : (i + 1) * row.experts]) for i, layer in enumerate(row.layers)]


def _wholes(row: Row, layer: int, experts: Experts) -> list[str]:
    """Returns the possible names of the tensor with an expert leaf of a layer: on disk, and in transformers' memory."""
    suffix = "_bias" if row.path[-1] == "bias" else ""
    in_memory = f"model.layers.{layer}.{experts.names.block}.{_MEMORY[row.path[-2]]}{suffix}"
    return [*([row.fused.format(layer=layer)] if row.fused else ()), in_memory]


def _whole_shape(row: Row, experts: Experts) -> tuple[int, ...]:
    out = row.shape[0] * (1 if row.path[-2] == "down_proj" else 2)
    shape = (out, *row.shape[1:])
    return (row.experts, *(reversed(shape) if experts.names.stored == "interleaved" else shape))


def _part(row: Row, experts: Experts, read: Callable[[], np.ndarray], expert: int) -> np.ndarray:
    whole, name = read()[expert], row.path[-2]
    if experts.names.stored == "interleaved":
        whole = whole.T
        return whole if name == "down_proj" else whole[0 if name == "gate_proj" else 1 :: 2]
    if name == "down_proj":
        return whole
    return whole[: row.shape[0]] if name == "gate_proj" else whole[row.shape[0] :]


def _renamed(files: TensorFiles, experts: Experts) -> TensorFiles:
    """Returns `files` with the names of checkpoints in place of those that transformers uses in memory."""
    changes = [(f".{theirs}.", f".{ours}.") for theirs, ours in experts.names.in_memory]
    if not changes:
        return files

    def on_disk(name: str) -> str:
        for theirs, ours in changes:
            if theirs in name and ours not in name:
                name = name.replace(theirs, ours)
        return name

    theirs = {on_disk(name): name for name in files.shapes}
    return dataclasses.replace(
        files,
        shapes={ours: files.shapes[name] for ours, name in theirs.items()},
        read=lambda name: files.read(theirs[name]),
        stored={ours: files.stored[name] for ours, name in theirs.items() if name in files.stored},
    )
