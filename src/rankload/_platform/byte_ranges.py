"""Sets of byte ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class ByteRanges:
    """A set of byte offsets, kept as sorted, disjoint, half-open ranges that do not touch."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self.total_bytes = 0
        for begin, end in ranges:
            self.add(begin, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._begins, self._ends, strict=True)))

    def __repr__(self) -> str:
        return f"ByteRanges({list(self)})"

    def add(self, begin: int, end: int) -> None:
        """Add a range. Bytes that are in the set already are not counted twice."""
        if begin >= end:
            return
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:  # touches or overlaps the ranges first … last - 1
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._replace(first, last, [(begin, end)])

    def remove(self, begin: int, end: int) -> None:
        """Remove a range, whether it is in the set or not."""
        first, last = bisect_right(self._ends, begin), bisect_left(self._begins, end)
        if begin >= end or first >= last:
            return
        rests = [(self._begins[first], begin), (end, self._ends[last - 1])]
        self._replace(first, last, [rest for rest in rests if rest[0] < rest[1]])

    def end_of(self, offset: int) -> int:
        """Return the end of the range that contains an offset, or the offset itself if it is not in the set."""
        index = bisect_right(self._begins, offset) - 1
        return max(self._ends[index], offset) if index >= 0 else offset

    def first_gap(self, limit: int | None = None) -> tuple[int, int | None]:
        """Return the first missing range. The next range of the set, or the limit, ends it.

        The end is None if neither exists. If nothing is missing, the range is empty and lies at the limit.
        """
        begin = self.end_of(0)
        index = bisect_right(self._begins, begin)
        end = self._begins[index] if index < len(self._begins) else limit
        if limit is not None and end is not None:
            begin, end = min(begin, limit), min(end, limit)
        return begin, end

    def _replace(self, first: int, last: int, ranges: list[tuple[int, int]]) -> None:
        removed = sum(self._ends[first:last]) - sum(self._begins[first:last])
        # one assignment: another thread computes a rate from this number, so it must not drop for a moment
        self.total_bytes += sum(end - begin for begin, end in ranges) - removed
        self._begins[first:last] = [begin for begin, _ in ranges]
        self._ends[first:last] = [end for _, end in ranges]
