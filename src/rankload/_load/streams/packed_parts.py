"""Pack parts of tensors, such as shards, into buckets: the elements of one part after the other, each in its own order.

All ranks that hold the same parts pack them in the same way, whatever else they hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.regions import Region, regions_of_range, whole
from rankload._load.sharing.gather_group import ALIGNMENT_BYTES
from rankload._load.streams.assemble import narrowed
from rankload._load.streams.whole_tensors import is_good_as_it_is

#: File, offset in the file, dtype, shape and strides of a tensor; offset and shape of the part. Sorts in the order of
#: the file, and is the same on all ranks.
PartKey = tuple[str, int, str, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def part_key(saved: FileTensor, region: Region) -> PartKey:
    """Return what identifies a part of a tensor."""
    entry = saved.entry
    return entry.file, entry.offset, entry.dtype, entry.shape, entry.stride, region.offset, region.shape


def is_packable(saved: FileTensor, region: Region) -> bool:
    """Return whether shares of a part can be read."""
    return is_good_as_it_is(saved) and region.element_count > 0


def pack(parts: Mapping[PartKey, Sequence[TensorCopy]], size: int) -> list[PackedParts]:
    """Pack parts into buckets of at most ``size`` bytes.

    Args:
        parts: copies by the part that they are of; each for which `is_packable` is True.
        size: a multiple of `ALIGNMENT_BYTES`.
    """
    buckets: list[list[_Piece]] = [[]]
    room = size
    for _, copies in sorted(parts.items()):
        item_bytes = _in_file(copies).dtype.itemsize
        first, count = 0, copies[0].region.element_count
        while first < count:
            if room < item_bytes:
                buckets.append([])
                room = size
            taken = min(count - first, room // item_bytes)
            buckets[-1].append(_Piece(copies, first, first + taken, size - room))
            first += taken
            room -= -(-taken * item_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return [PackedParts(pieces) for pieces in buckets if pieces]


class PackedParts:
    """A bucket of parts of tensors."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return self._pieces[-1].end

    def read(self, address: int, begin: int, end: int) -> int:
        """Read bytes ``begin`` to ``end`` of the bucket to an address in memory; return how many bytes that took."""
        bytes_read = 0
        for piece in self._pieces:
            first, last = max(begin, piece.begin), min(end, piece.end)
            if first < last:
                bytes_read += piece.read(address + first - begin, first - piece.begin, last - piece.begin)
        return bytes_read

    def finish(self, content: torch.Tensor) -> None:
        """Copy the bytes of the bucket, ``uint8[n]``, to where they belong."""
        for piece in self._pieces:
            piece.finish(content.narrow(0, piece.begin, piece.end - piece.begin))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive elements of a part.

    Attributes:
        copies: copies of the part; more than one for tied tensors.
        first: index of the first element in the part.
        last: index one past the last element.
        begin: offset of the first byte in the bucket.
    """

    copies: Sequence[TensorCopy]
    first: int
    last: int
    begin: int

    @property
    def end(self) -> int:
        """Offset one past the last byte in the bucket."""
        return self.begin + (self.last - self.first) * _in_file(self.copies).dtype.itemsize

    def read(self, address: int, begin: int, end: int) -> int:
        """Read bytes of the piece to an address; return how many bytes that took."""
        saved, bytes_read = _in_file(self.copies), 0
        item_bytes = saved.dtype.itemsize
        memory = torch.frombuffer((ctypes.c_ubyte * (end - begin)).from_address(address), dtype=torch.uint8)
        first, last = self.first + begin // item_bytes, self.first + end // item_bytes
        for box, elements in self._boxes(first, last, memory.view(saved.dtype)):
            origin = self.copies[0].region.offset
            in_tensor = Region(tuple(map(sum, zip(box.offset, origin, strict=True))), box.shape)
            bytes_read += saved.reader(elements, in_tensor)()
        return bytes_read

    def finish(self, content: torch.Tensor) -> None:
        """Copy the elements to their destinations. ``content`` is ``uint8[n]``."""
        for box, elements in self._boxes(self.first, self.last, content.view(_in_file(self.copies).dtype)):
            for copy in self.copies:
                part = narrowed(copy.destination, whole(copy.region.shape), box)
                part.copy_(elements.to(copy.saved.dtype))

    def _boxes(self, first: int, last: int, elements: torch.Tensor) -> Iterator[tuple[Region, torch.Tensor]]:
        """Cut elements ``first`` to ``last`` of the part into boxes: the place in the part, and the elements."""
        for box, start in regions_of_range(self.copies[0].region.shape, first, last):
            yield box, elements.narrow(0, start - first, box.element_count).view(box.shape)


def _in_file(copies: Sequence[TensorCopy]) -> FileTensor:
    saved = copies[0].saved.in_file
    assert saved is not None
    return saved
