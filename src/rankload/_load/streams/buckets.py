"""Cut the bytes that travel into buckets. Pure: all ranks cut the same index the same way."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankload._formats.entry import StorageEntry, TensorEntry

#: A piece; the most that a receiver holds beyond its own tensors.
BUCKET_BYTES = 8 << 20

#: Bytes between two tensors that are sent along: less than it costs to begin anew.
_GAP_BYTES = 64 << 10

#: Smaller tensors travel with the headers, as long as all of them stay below the other limit.
_SMALL_BYTES = (64 << 10, 4 << 10, 0)
_ALL_SMALL_BYTES = 64 << 20

#: Where a tensor is cut, from its begin: a multiple of every element's size, and of torch.save's alignment.
_ALIGNMENT_BYTES = 64

#: Begin and end, in bytes of a file.
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A piece of a file.

    Attributes:
        file: its name.
        begin: its first byte.
        end: one past its last byte.
    """

    file: str
    begin: int
    end: int

    def __len__(self) -> int:
        """Return its bytes."""
        return self.end - self.begin


def header_ranges(sizes: Mapping[str, int], storages: Collection[StorageEntry]) -> dict[str, list[Range]]:
    """Return what is in no storage, by file: all that an index is read from; and storages too small to matter.

    Args:
        sizes: of the files, in bytes.
        storages: all of them; those of objects that only torch.load builds, too, which nobody can build from headers.
    """
    small = next(limit for limit in _SMALL_BYTES if not limit or _bytes_up_to(limit, storages) <= _ALL_SMALL_BYTES)
    left_out = defaultdict(list)
    for storage in storages:
        if storage.length > small:
            left_out[storage.file].append((storage.offset, storage.offset + storage.length))
    return {file: _complement(_merged(left_out[file], 0), size) for file, size in sizes.items()}


def tensor_ranges(tensors: Iterable[TensorEntry], kept: Mapping[str, Sequence[Range]]) -> dict[str, list[Range]]:
    """Return what has to travel for the given tensors, by file, beyond what the headers have brought."""
    wanted = defaultdict(list)
    for entry in tensors:
        if entry.length and not is_kept(entry, kept):
            wanted[entry.file].append((entry.offset, entry.offset + entry.length))
    return {file: _merged(ranges, _GAP_BYTES) for file, ranges in sorted(wanted.items())}


def covers(ranges: Sequence[Range], begin: int, end: int) -> bool:
    """Return whether one of the ranges, which are sorted and apart, has all the bytes from begin to end."""
    number = bisect_right(ranges, begin, key=lambda piece: piece[0])  # of those that begin at or before it
    return number > 0 and end <= ranges[number - 1][1]


def is_kept(entry: TensorEntry, ranges: Mapping[str, Sequence[Range]]) -> bool:
    """Return whether ranges, by file, have all the bytes of a tensor."""
    return covers(ranges.get(entry.file, ()), entry.offset, entry.offset + entry.length)


def cut(
    ranges: Mapping[str, Sequence[Range]], tensors: Iterable[TensorEntry], bucket_bytes: int | None = None
) -> list[Bucket]:
    """Cut ranges into buckets, between two elements of the tensor that is cut.

    Args:
        ranges: by file.
        tensors: all that lie in them.
        bucket_bytes: the most that a bucket has; default `BUCKET_BYTES`.
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
