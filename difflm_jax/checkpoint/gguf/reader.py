"""A faster `gguf.GGUFReader`: long arrays (vocabulary, merges) are read at once, as they dominated the time to open."""

import mmap
from typing import Any

from gguf import GGUFReader, GGUFValueType


class Reader(GGUFReader):
    """Has the fields and tensors of `GGUFReader`; the strings of an array are views of the file's bytes."""

    def release(self) -> None:
        """Takes the pages of the file that were read out of this process. Whoever reads them again gets the same bytes.

        A mapped file else counts in full towards the memory of the process once all tensors were read.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self.data._mmap.madvise(mmap.MADV_DONTNEED)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, "u4"), self._get(orig_offs + 4, "u8")]
        kind, count, start = GGUFValueType(int(head[0][0])), int(head[1][0]), orig_offs + 12
        if (dtype := self.gguf_scalar_to_np.get(kind)) is not None:
            values = self._get(start, dtype, count)
            parts, places, size = list(values.reshape(-1, 1)), range(2, 2 + count), values.nbytes
        elif kind == GGUFValueType.STRING:
            parts, size = self._strings(start, count)
            places = range(3, 3 + 2 * count, 2)
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, *([kind] if count else [])]
        return 12 + size, [*head, *parts], list(places), types

    def _strings(self, start: int, count: int) -> tuple[list[memoryview], int]:
        """Returns the length and the bytes of each of `count` strings in turn, and the total number of bytes."""
        data, at, parts = memoryview(self.data), start, []
        for _ in range(count):
            text = at + 8
            end = text + int.from_bytes(data[at:text], "little")
            parts += (data[at:text], data[text:end])
            at = end
        return parts, at - start
