"""Rectangular regions of a tensor, and the positions of their elements in memory. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rankload._formats.entry import contiguous_stride


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangular part of a tensor, in elements per dimension.

    Attributes:
        offset: index of the first element, per dimension.
        shape: sizes; a size may be 0.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def whole(shape: tuple[int, ...]) -> Region:
    """Return the region of a whole tensor."""
    return Region((0,) * len(shape), shape)


@dataclass(frozen=True, slots=True)
class Runs:
    """A region as runs of equal length, in the order of the region's own elements.

    Attributes:
        length: elements per run; they are consecutive in the whole tensor.
        starts: index of each run's first element in the whole tensor; can be iterated only once.
    """

    length: int
    starts: Iterator[int]


def runs(shape: tuple[int, ...], region: Region) -> Runs:
    """Cut a region of a contiguous tensor of this shape into the longest possible runs."""
    if region.element_count == 0:
        return Runs(0, iter(()))
    first = len(shape)  # first dimension that is part of a run
    while first > 0 and region.shape[first:] == shape[first:]:
        first -= 1
    stride = contiguous_stride(shape)
    origin = sum(start * step for start, step in zip(region.offset, stride, strict=True))
    outer = [range(0, size * step, step) for size, step in zip(region.shape[:first], stride[:first], strict=True)]
    starts = (origin + sum(steps) for steps in itertools.product(*outer))
    return Runs(math.prod(region.shape[first:]), starts)


def intersection(region: Region, other: Region) -> Region | None:
    """Return the intersection of two regions of one tensor; None if it is empty."""
    starts = tuple(map(max, region.offset, other.offset))
    ends = tuple(
        min(start + size, other_start + other_size)
        for start, size, other_start, other_size in zip(
            region.offset, region.shape, other.offset, other.shape, strict=True
        )
    )
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Region(starts, sizes) if min(sizes, default=1) > 0 else None


def regions_of_range(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[Region, int]]:
    """Cut a range of a contiguous tensor's elements into regions, at most two per dimension.

    Yields:
        Each region, whose elements are consecutive, and the index of its first element.
    """
    if begin >= end:
        return
    if not shape:
        yield Region((), ()), begin
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # the whole rows
    if begin % row:  # the end of a row, or a part in the middle of one
        yield from _within(first - 1, shape, row, begin, min(end, first * row))
    if first < last:
        rest = shape[1:]
        yield Region((first, *(0,) * len(rest)), (last - first, *rest)), first * row
    if last >= first and end % row:
        yield from _within(last, shape, row, last * row, end)


def _within(index: int, shape: tuple[int, ...], row: int, begin: int, end: int) -> Iterator[tuple[Region, int]]:
    for region, start in regions_of_range(shape[1:], begin - index * row, end - index * row):
        yield Region((index, *region.offset), (1, *region.shape)), index * row + start
