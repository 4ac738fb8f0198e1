"""Reads and writes 4-bit weights in the exact layout of bitsandbytes, as transformers saves it.

`x.weight` has two codes per byte in row-major order, the first in the high nibble. Next to it are `x.weight.absmax`,
`.quant_map`, with double quantisation `.nested_absmax` and `.nested_quant_map`, and a JSON text in
`.quant_state.bitsandbytes__nf4` (bitsandbytes/functional.py, `QuantState`). A weight without that text is not
quantised, whatever the config says. The maps are read from the file: NF4's is checked, the nested one is used.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.checkpoint.safetensors import FLOAT_DTYPES, TensorFiles, open_shards
from difflm_jax.errors import UserError, one_line
from difflm_jax.quant import NestedScales, QTensor, QuantConfig
from difflm_jax.quant.nested import BLOCK as NESTED_BLOCK
from difflm_jax.quant.nf4 import LEVELS
from difflm_jax.quant.qtensor import pack, unpack

_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map")
_NESTED_PARTS = (".nested_absmax", ".nested_quant_map")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The contents of the JSON text of one weight."""

    shape: tuple[int, int]
    block_size: int
    nested_offset: float | None

    @property
    def parts(self) -> tuple[str, ...]:
        return _PARTS if self.nested_offset is None else _PARTS + _NESTED_PARTS


def open_quantised(directory: Path, quantization_config: Any) -> TensorFiles:
    """Opens a model directory whose `config.json` has a `quantization_config`.

    Raises `UserError` for any format but bitsandbytes' NF4, and for statistics that are missing or not supported.
    """
    where = f"{directory / 'config.json'}: quantization_config"
    if not isinstance(quantization_config, Mapping) or quantization_config.get("quant_method") != "bitsandbytes":
        method = quantization_config.get("quant_method") if isinstance(quantization_config, Mapping) else None
        raise UserError(f"{where}: quant_method {method!r} is not supported (only 'bitsandbytes', in 4 bits)")
    if not quantization_config.get("load_in_4bit"):
        raise UserError(f"{where}: load_in_8bit is not supported; use the unquantised model with quantization='int8'")
    if (kind := quantization_config.get("bnb_4bit_quant_type")) != "nf4":
        raise UserError(f"{where}: bnb_4bit_quant_type {kind!r} is not supported (only 'nf4')")
    files = open_shards(directory, dtypes=(*FLOAT_DTYPES, "U8"))
    names = [name.removesuffix(_STATE) for name in files.shapes if name.endswith(_STATE)]
    stored = {name: _read_state(directory, files, name) for name in names}
    beside = {name + part for name in names for part in (*stored[name].parts, _STATE)}
    shapes = {name: shape for name, shape in files.shapes.items() if name not in beside}
    shapes.update({name: state.shape for name, state in stored.items()})

    def read(name: str) -> np.ndarray | QTensor:
        return _read_weight(directory, files, name, stored[name]) if name in stored else files.read(name)

    configs = {
        name: QuantConfig("nf4", state.block_size, state.nested_offset is not None) for name, state in stored.items()
    }
    return dataclasses.replace(files, shapes=shapes, read=read, stored=configs)


def bitsandbytes_tensors(name: str, w: QTensor, dtype: str) -> dict[str, np.ndarray]:
    """Returns the tensors that store the NF4 weight `name` [out, in]; `dtype` names the dtype before quantisation."""
    state = {"quant_type": "nf4", "blocksize": w.block_size, "dtype": dtype, "shape": list(w.shape)}
    tensors = {name: np.asarray(_to_row_major(w.codes, w.block_size)), f"{name}.quant_map": LEVELS}
    if isinstance(w.scales, NestedScales):
        tensors[f"{name}.absmax"] = np.asarray(w.scales.codes).reshape(-1)
        tensors[f"{name}.nested_absmax"] = np.asarray(w.scales.absmax)
        tensors[f"{name}.nested_quant_map"] = np.asarray(w.scales.code_map)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(w.scales.offset)
    else:
        tensors[f"{name}.absmax"] = np.asarray(w.scales).reshape(-1)
    tensors[name + _STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def bitsandbytes_config(w: QTensor, skipped: list[str], dtype: str) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint of weights like `w`. `skipped` modules are not quantised."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": isinstance(w.scales, NestedScales),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": skipped,
    }


def _read_state(directory: Path, files: TensorFiles, name: str) -> _Stored:
    where = f"{directory}: {name}{_STATE}"
    try:
        values = json.loads(files.read(name + _STATE).tobytes())
        shape, block_size = tuple(int(size) for size in values["shape"]), int(values["blocksize"])
        nested_offset = float(values["nested_offset"]) if "nested_offset" in values else None
        nested_block = int(values.get("nested_blocksize", NESTED_BLOCK))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: is no quantisation state ({one_line(error)})") from error
    if len(shape) != 2 or min(shape) < 1 or nested_block != NESTED_BLOCK:
        raise UserError(f"{where}: shape {list(shape)} and nested_blocksize {nested_block} are not supported")
    state = _Stored(shape, block_size, nested_offset)
    if missing := [name + part for part in ("", *state.parts) if name + part not in files.shapes]:
        raise UserError(f"{where}: goes with {', '.join(missing)}, which the checkpoint lacks")
    if block_size < 1 or shape[1] % block_size:
        raise UserError(f"{where}: blocks of {block_size} span the rows of {list(shape)}, which is not supported")
    return state


def _read_weight(directory: Path, files: TensorFiles, name: str, state: _Stored) -> QTensor:
    """Returns the weight in our layout. Its codes are on the default device, its scales on the host."""
    out_dim, in_dim = state.shape
    scales_shape = (out_dim, in_dim // state.block_size)

    def part(suffix: str, size: int, dtype: Any) -> np.ndarray:
        tensor = files.read(name + suffix).reshape(-1)
        tensor = tensor.view(np.uint8) if dtype == np.uint8 else tensor.astype(dtype)
        if tensor.size != size:
            raise UserError(f"{directory}: {name}{suffix}: holds {tensor.size} values, not {size}")
        return tensor

    if not np.array_equal(part(".quant_map", 16, np.float32), LEVELS):
        raise UserError(f"{directory}: {name}.quant_map: is not the map of NF4")
    codes = _from_row_major(part("", out_dim * in_dim // 2, np.uint8), scales_shape, state.block_size)
    blocks = out_dim * in_dim // state.block_size
    if state.nested_offset is None:
        return QTensor(codes, part(".absmax", blocks, np.float32).reshape(scales_shape), "nf4")
    scales = NestedScales(
        codes=part(".absmax", blocks, np.uint8).reshape(scales_shape),
        absmax=part(".nested_absmax", -(-blocks // NESTED_BLOCK), np.float32),
        offset=np.float32(state.nested_offset),
        code_map=part(".nested_quant_map", 256, np.float32),
    )
    return QTensor(codes, scales, "nf4")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _from_row_major(packed: jax.Array, scales_shape: tuple[int, int], block_size: int) -> jax.Array:
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return pack(codes.reshape(*scales_shape, block_size))


@functools.partial(jax.jit, static_argnums=1)
def _to_row_major(packed: jax.Array, block_size: int) -> jax.Array:
    codes = unpack(packed, block_size).reshape(-1, 2)
    return (codes[:, :1] << 4) | codes[:, 1:]
