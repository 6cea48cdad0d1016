"""Cut the transferred bytes into buckets. Pure: all ranks cut the same index in the same way."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankload._formats.entry import StorageEntry, TensorEntry

#: Size of a bucket, the most that a receiver holds beyond its own tensors.
BUCKET_BYTES = 8 << 20

#: Largest gap between two tensors that is sent along, because a new range would cost more.
_GAP_BYTES = 64 << 10

#: Largest storage that travels with the headers: the first limit under which all such storages have at most
#: ``_ALL_SMALL_BYTES``.
_SMALL_BYTES = (64 << 10, 4 << 10, 0)
_ALL_SMALL_BYTES = 64 << 20

#: Tensors are cut at multiples of this, from their first byte: a multiple of every element size, and of torch.save's
#: alignment.
_ALIGNMENT_BYTES = 64

#: Begin and end, in bytes of a file.
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A piece of a file.

    Attributes:
        file: name of the file.
        begin: offset of the first byte.
        end: offset one past the last byte.
    """

    file: str
    begin: int
    end: int

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self.end - self.begin


def header_ranges(sizes: Mapping[str, int], storages: Collection[StorageEntry]) -> dict[str, list[Range]]:
    """Return the ranges outside of storages, by file: everything that an index is read from. Add small storages.

    Args:
        sizes: sizes of the files in bytes, by name.
        storages: all storages, including those of objects that only torch.load builds: headers cannot replace them.
    """
    small = next(limit for limit in _SMALL_BYTES if not limit or _bytes_up_to(limit, storages) <= _ALL_SMALL_BYTES)
    left_out = defaultdict(list)
    for storage in storages:
        if storage.length > small:
            left_out[storage.file].append((storage.offset, storage.offset + storage.length))
    return {file: _complement(_merged(left_out[file], 0), size) for file, size in sizes.items()}


def tensor_ranges(tensors: Iterable[TensorEntry], kept: Mapping[str, Sequence[Range]]) -> dict[str, list[Range]]:
    """Return the ranges to send for the given tensors, by file, without the ranges that came with the headers."""
    wanted = defaultdict(list)
    for entry in tensors:
        if entry.length and not is_kept(entry, kept):
            wanted[entry.file].append((entry.offset, entry.offset + entry.length))
    return {file: _merged(ranges, _GAP_BYTES) for file, ranges in sorted(wanted.items())}


def covers(ranges: Sequence[Range], begin: int, end: int) -> bool:
    """Return whether one of the sorted, disjoint ranges contains all bytes from ``begin`` to ``end``."""
    number = bisect_right(ranges, begin, key=lambda piece: piece[0])  # count of ranges that begin at or before it
    return number > 0 and end <= ranges[number - 1][1]


def is_kept(entry: TensorEntry, ranges: Mapping[str, Sequence[Range]]) -> bool:
    """Return whether the ranges of a tensor's file contain all its bytes."""
    return covers(ranges.get(entry.file, ()), entry.offset, entry.offset + entry.length)


def cut(
    ranges: Mapping[str, Sequence[Range]], tensors: Iterable[TensorEntry], bucket_bytes: int | None = None
) -> list[Bucket]:
    """Cut ranges into buckets; a tensor is cut only between two elements.

    Args:
        ranges: ranges to cut, by file.
        tensors: all tensors in the ranges.
        bucket_bytes: most bytes of a bucket; default `BUCKET_BYTES`.
    """
    by_file = defaultdict(list)
    for entry in sorted(tensors, key=lambda entry: entry.offset):
        by_file[entry.file].append(entry)
    return [
        Bucket(file, *piece)
        for file, of_file in ranges.items()
        for begin, end in of_file
        for piece in _pieces(begin, end, by_file[file], bucket_bytes or BUCKET_BYTES)
    ]


def _pieces(begin: int, end: int, entries: Sequence[TensorEntry], bucket_bytes: int) -> list[Range]:
    offsets = [entry.offset for entry in entries]
    pieces = []
    while end - begin > bucket_bytes:
        at = begin + bucket_bytes
        before = bisect_right(offsets, at) - 1
        if before >= 0:
            at -= (at - offsets[before]) % _ALIGNMENT_BYTES
        pieces.append((begin, at))
        begin = at
    return [*pieces, (begin, end)]


def _bytes_up_to(limit: int, storages: Iterable[StorageEntry]) -> int:
    return sum(storage.length for storage in storages if storage.length <= limit)


def _merged(ranges: Iterable[Range], gap_bytes: int) -> list[Range]:
    merged: list[Range] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1] + gap_bytes:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _complement(ranges: Sequence[Range], size: int) -> list[Range]:
    edges = [0, *(edge for piece in ranges for edge in piece), size]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
