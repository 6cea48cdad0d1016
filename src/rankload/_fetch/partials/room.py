"""Decide how much disk space to allocate ahead of the arriving bytes. Pure."""

from __future__ import annotations

#: Least number of bytes to allocate, unless the file is smaller.
_FIRST_BYTES = 64 << 20


class Room:
    """The allocated part of a file. It starts at the beginning of the file, and doubles each time.

    Allocating ahead keeps a file contiguous. If another process fills the disk meanwhile, that process gets the error,
    not this download. But the length is only the origin's claim: a single header must not suffice to fill a disk. So at
    most 64 MiB, or four times the arrived bytes, are allocated.

    Args:
        size_bytes: announced length of the file, which limits the allocation.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes, self._allocated_bytes = size_bytes, 0

    def grown(self, arrived_bytes: int) -> tuple[int, int]:
        """Return the next range to allocate, given the number of bytes that have arrived; usually an empty range."""
        begin = end = self._allocated_bytes
        while end < self._size_bytes and 2 * arrived_bytes >= end:
            end = min(max(2 * end, _FIRST_BYTES), self._size_bytes)
        self._allocated_bytes = end
        return begin, end
