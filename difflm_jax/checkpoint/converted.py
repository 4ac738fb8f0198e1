"""A quantised base stored on disk in its in-memory layout, so that the next start loads it in seconds.

One safetensors file contains the stacked leaves. Its metadata describes the source and has a checksum of every leaf.
Another source, format or dtype has another file name. A damaged file is reported and written again.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from difflm_jax.checkpoint.hf import abstract_params, load_params
from difflm_jax.checkpoint.safetensors import write_file
from difflm_jax.checkpoint.source import Source
from difflm_jax.errors import one_line
from difflm_jax.quant import QuantConfig

_LAYOUT = 1  # increase it whenever `QTensor` or the tree changes


def load_converted(source: Source, dtype: Any, quantization: QuantConfig, directory: Path) -> dict[str, Any]:
    """Returns `load_params` through a file in `directory`, which is read if it is valid, and written otherwise.

    A file that cannot be written is reported; the weights are returned anyway.
    """
    key = json.dumps(_key(source, dtype, quantization), sort_keys=True)
    path = directory / f"{quantization.format}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    expected = abstract_params(source.config, dtype, quantization)
    if path.is_file():
        try:
            return _read(path, key, expected)
        except (SafetensorError, OSError, ValueError) as error:
            print(
                f"{path}: is damaged ({one_line(error)}): converting {source.name} again", file=sys.stderr, flush=True
            )
    params = load_params(source, dtype, quantization)
    try:
        _write(path, key, params)
    except OSError as error:
        print(f"{path}: cannot be kept ({one_line(error)}): the next start converts again", file=sys.stderr, flush=True)
    return params


def _key(source: Source, dtype: Any, quantization: QuantConfig) -> dict[str, Any]:
    return {
        "layout": _LAYOUT,
        "source": source.fingerprint(),
        "config": repr(source.config),
        "format": quantization.format,
        "block_size": quantization.block_size,
        "double_quant": quantization.double_quant,
        "dtype": jnp.dtype(dtype).name,
    }


def _write(path: Path, key: str, params: Mapping[str, Any]) -> None:
    leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(params).items()}
    checksums = json.dumps({name: _checksum(leaf) for name, leaf in leaves.items()})
    unfinished = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(unfinished, leaves, {"key": key, "checksums": checksums})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path, key: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the tree of the shapes and dtypes `expected`. Raises `ValueError` if the file differs from it."""
    named, loaded = _named_leaves(expected), {}
    with safe_open(str(path), framework="numpy") as file:
        about = file.metadata() or {}
        checksums = json.loads(about.get("checksums", "{}"))
        if about.get("key") != key or set(file.keys()) != set(named):
            raise ValueError("it holds other weights than its name says")
    for name, leaf in named.items():
        with safe_open(str(path), framework="numpy") as file:  # reopened, so that leaves read before are unmapped
            tensor = file.get_tensor(name)
        if (tensor.shape, tensor.dtype) != (leaf.shape, leaf.dtype) or _checksum(tensor) != checksums.get(name):
            raise ValueError(f"{name} is not what was written")
        loaded[name] = jax.block_until_ready(jax.device_put(tensor))
    return jax.tree.unflatten(jax.tree.structure(expected), [loaded[name] for name in named])


def _named_leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksum(array: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
