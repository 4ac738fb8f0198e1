"""Checks every length in the header of a GGUF file against the size of the file.

`gguf.GGUFReader` trusts the header: for an array of 2^60 elements it appends to a list until memory runs out. The
layout is that of the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 2 and 3.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_NAME = 1 << 16
_TENSOR_TYPES = {int(kind) for kind in GGMLQuantizationType}
_SCALARS = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


def check_header(path: Path) -> None:
    """Raises `ValueError` for a bad header. The size of the file bounds the time and memory of the check."""
    with path.open("rb") as file:
        header = _Header(file, path.stat().st_size)
        if header.take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := header.number("<I")) not in _VERSIONS:
            raise ValueError(f"version {version} is not 2 or 3 in this machine's byte order")
        tensors, keys = header.number("<Q"), header.number("<Q")
        header.expect(tensors, 8 + 4 + 4 + 8, "tensors")
        header.expect(keys, 8 + 4 + 1, "keys")
        for _ in range(keys):
            header.skip_string(_MAX_NAME)
            header.skip_value(header.number("<I"))
        needed = max((_check_tensor(header) for _ in range(tensors)), default=0)
        if needed > header.left:
            raise ValueError(f"tensors need {needed} bytes, but {header.left} are left")


def _check_tensor(header: "_Header") -> int:
    """Returns the number of bytes that a tensor needs after the header."""
    header.skip_string(_MAX_NAME)
    if (dimensions := header.number("<I")) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    sizes = [header.number("<Q") for _ in range(dimensions)]
    kind, offset = header.number("<I"), header.number("<Q")
    if kind not in _TENSOR_TYPES:
        raise ValueError(f"tensor type {kind} is not known")
    elements = 1
    for size in sizes:
        elements *= size  # Python's integers do not wrap around
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return offset + -(-elements // block) * block_bytes


class _Header:
    """Reads values in order, and never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self.left = file, size

    def take(self, count: int) -> bytes:
        self._account(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._account(count)
        self._file.seek(count, 1)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def expect(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.left:
            raise ValueError(f"{count} {what} cannot be in the {self.left} bytes that are left")

    def skip_string(self, longest: int | None = None) -> None:
        length = self.number("<Q")
        if longest is not None and length > longest:
            raise ValueError(f"a name of {length} bytes")
        self.skip(length)

    def skip_value(self, kind: int) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[GGUFValueType(kind)])
        elif kind == GGUFValueType.STRING:
            self.skip_string()
        elif kind == GGUFValueType.ARRAY:
            element, count = self.number("<I"), self.number("<Q")
            if element in _SCALARS:
                self.skip(count * _SCALARS[GGUFValueType(element)])
            elif element == GGUFValueType.STRING:
                self.expect(count, 8, "strings")
                for _ in range(count):
                    self.skip_string()
            else:
                raise ValueError(f"an array of type {element}")
        else:
            raise ValueError(f"a value of type {kind}")

    def _account(self, count: int) -> None:
        if count > self.left:
            raise ValueError(f"{count} bytes are wanted where {self.left} are left")
        self.left -= count
