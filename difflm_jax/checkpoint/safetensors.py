"""Reads and writes safetensors files: single ones, and those of a Hugging Face directory (one file, or an index)."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from difflm_jax.errors import UserError, one_line
from difflm_jax.quant import QTensor, QuantConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("F32", "F16", "BF16")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "U8": np.uint8}
_ALIGNMENT = 64  # bytes; jax copies arrays with another alignment
_LISTED = 8  # names that an error lists per kind of fault
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a checkpoint.

    shapes: name -> shape. read(name): returns one tensor, a `QTensor` if its name is in `stored`, else an array.
    defects: faults of the files, for any model. stored: name -> how the tensor is quantised. unindexed: tensors that
    the index does not list; a model may ignore them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray | QTensor]
    defects: tuple[str, ...] = ()
    stored: Mapping[str, QuantConfig] = dataclasses.field(default_factory=dict)
    unindexed: frozenset[str] = frozenset()


def open_shards(directory: Path, dtypes: tuple[str, ...] = FLOAT_DTYPES) -> TensorFiles:
    """Opens the safetensors of a model directory. Data are only read by `read(name)`, one tensor at a time.

    dtypes: the allowed dtypes. `model.safetensors` has priority over an index, as in transformers. Raises `UserError`
    for an unreadable file, a missing shard, and an index that points out of the directory.
    """
    if (directory / SINGLE_FILE).is_file():
        return open_files([directory / SINGLE_FILE], dtypes=dtypes)
    if (directory / INDEX_FILE).is_file():
        weight_map, defects = _read_index(directory / INDEX_FILE)
        files = open_files([directory / name for name in sorted(set(weight_map.values()))], dtypes)
        unindexed = _differences(directory, files, weight_map)
        return dataclasses.replace(files, defects=defects + files.defects, unindexed=unindexed)
    if pickled := [name for name in _PICKLED if (directory / name).is_file()]:
        raise UserError(
            f"{directory}: holds {pickled[0]} but no safetensors; pickled weights are not opened: convert them with "
            "transformers (from_pretrained, then save_pretrained)"
        )
    raise UserError(f"{directory}: has no {SINGLE_FILE} and no {INDEX_FILE}")


def open_files(paths: list[Path], dtypes: tuple[str, ...] = FLOAT_DTYPES) -> TensorFiles:
    """Opens safetensors files. Tensors in two files, and tensors whose dtype is not in `dtypes`, become `defects`."""
    shapes: dict[str, tuple[int, ...]] = {}
    home: dict[str, Path] = {}
    defects: list[str] = []
    for path in paths:
        handle = _open_file(path)
        for name in handle.keys():  # noqa: SIM118 (not a dictionary)
            if name in home:
                defects.append(f"{name} is in both {home[name].name} and {path.name}")
                continue
            entry = handle.get_slice(name)
            home[name], shapes[name] = path, tuple(entry.get_shape())
            if entry.get_dtype() not in dtypes:
                defects.append(f"{name} has dtype {entry.get_dtype()} (not one of {', '.join(dtypes)})")
    return TensorFiles(shapes, _Reader(home), tuple(defects))


def _differences(directory: Path, files: TensorFiles, weight_map: Mapping[str, str]) -> frozenset[str]:
    """Returns the tensors that the index does not list, and prints a note if the index is not exact.

    As in transformers, the index determines the files, and the files determine the tensors.
    """
    unindexed = frozenset(files.shapes) - weight_map.keys()
    ways = {
        "named, and in no file": sorted(weight_map.keys() - files.shapes.keys()),
        "in a file, and not named": sorted(unindexed),
        "in another file": [
            name for name, file in weight_map.items() if name in files.shapes and files.read.file_of(name) != file
        ],
    }
    if text := describe_faults(ways):
        print(f"note: {directory / INDEX_FILE} is not exact: {text}; the files count", file=sys.stderr)
    return unindexed


class _Reader:
    """Reads tensors by name, from their file directly into aligned memory that jax uses without a copy.

    The safetensors library would map the file and copy the data twice. It is only used to validate the header.
    """

    def __init__(self, home: Mapping[str, Path]):
        self._home = home
        self._headers: dict[Path, tuple[int, dict]] = {}

    def file_of(self, name: str) -> str:
        return self._home[name].name

    def __call__(self, name: str) -> np.ndarray:
        path = self._home[name]
        try:
            with path.open("rb", buffering=0) as file:
                if path not in self._headers:
                    self._headers[path] = _header(file)
                first_byte, entries = self._headers[path]
                entry = entries[name]
                tensor = _aligned(tuple(entry["shape"]), np.dtype(_DTYPES[entry["dtype"]]))
                file.seek(first_byte + entry["data_offsets"][0])
                _fill(memoryview(tensor.reshape(-1).view(np.uint8)), file)
        except (OSError, ValueError, KeyError, OverflowError) as error:
            raise UserError(f"{path}: {name} cannot be read; has the file changed? ({one_line(error)})") from error
        return tensor


def _header(file: BinaryIO) -> tuple[int, dict]:
    """Returns (offset of the data in the file, {tensor: its dtype, shape and offsets in the data})."""
    length = int.from_bytes(file.read(8), "little")
    return 8 + length, json.loads(file.read(length))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _fill(memory: memoryview, file: BinaryIO) -> None:
    """Reads until `memory` is full, because one call reads at most 2 GB. Raises `OSError` at the end of the file."""
    while len(memory):
        count = file.readinto(memory)
        if not count:
            raise OSError(f"it ends {len(memory)} bytes before the tensor does")
        memory = memory[count:]


def _open_file(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="numpy")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, though {INDEX_FILE} names it") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({one_line(error)}); fetch it again") from error


def write_file(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file as transformers and peft do. Raises `OSError` if it cannot be written."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"} if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(one_line(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes it readable only by its owner


def describe_faults(faults: Mapping[str, Iterable[str]]) -> str:
    """Lists all faults by kind in one line, as in "2 missing (a, b); 1 unknown (c)"; "" if there are none."""
    parts = []
    for kind, names in faults.items():
        names = list(names)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        if names:
            parts.append(f"{len(names)} {kind} ({', '.join(names[:_LISTED])}{more})")
    return "; ".join(parts)


def read_json(path: Path) -> dict:
    """Reads the object in a JSON file. Raises `UserError` if it cannot be read or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _read_index(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the `weight_map` of an index, and a message for each key that occurs twice. Raises `UserError`."""
    twice: list[str] = []

    def object_of(pairs: list[tuple[str, object]]) -> dict:
        seen: dict[str, object] = {}
        for key, value in pairs:
            if key in seen:
                twice.append(f"{key} is twice in {path.name}")
            seen[key] = value
        return seen

    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_of)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map from tensors to files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0:")
        if not plain or not file.endswith(".safetensors"):
            raise UserError(f"{path}: {name} is given to {file!r}, which is not a safetensors file of this directory")
    return weight_map, tuple(twice)
