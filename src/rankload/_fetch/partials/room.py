"""How many blocks to allocate ahead of the bytes that arrive. Pure."""

from __future__ import annotations

#: Allocated for any file, as far as it is that long.
_FIRST_BYTES = 64 << 20


class Room:
    """The part of a file that is allocated: always from its beginning, and twice as much each time.

    Allocating ahead keeps a file contiguous, and whoever fills the disk meanwhile gets the error instead of this
    download. But the length is only what the origin says: one header must not be enough to fill a disk. So at most
    64 MiB, or four times what has arrived, is allocated.

    Args:
        size_bytes: the announced length; no more is allocated, ever.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes, self._allocated_bytes = size_bytes, 0

    def grown(self, arrived_bytes: int) -> tuple[int, int]:
        """Return the next range to allocate, given the number of bytes that are there; mostly an empty one."""
        begin = end = self._allocated_bytes
        while end < self._size_bytes and 2 * arrived_bytes >= end:
            end = min(max(2 * end, _FIRST_BYTES), self._size_bytes)
        self._allocated_bytes = end
        return begin, end
