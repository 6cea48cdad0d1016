"""The part of a tensor that is a rank's own, and where its elements lie in a contiguous tensor. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rankload._checkpoint.entry import contiguous_stride


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor, in elements per dimension.

    Attributes:
        offset: of its first element.
        shape: its sizes; one of them may be 0.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box that is all of a tensor."""
    return Box((0,) * len(shape), shape)


@dataclass(frozen=True, slots=True)
class Runs:
    """A box as runs of equal length, in the order of the box's own elements.

    Attributes:
        length: elements of each, one after the other in the whole tensor.
        starts: index of the first element of each, in the whole tensor; iterated once.
    """

    length: int
    starts: Iterator[int]


def runs(shape: tuple[int, ...], box: Box) -> Runs:
    """Cut a box of a contiguous tensor of this shape into the longest runs that there are."""
    if box.element_count == 0:
        return Runs(0, iter(()))
    first = len(shape)  # of the dimensions that are in the run
    while first > 0 and box.shape[first:] == shape[first:]:
        first -= 1
    stride = contiguous_stride(shape)
    origin = sum(start * step for start, step in zip(box.offset, stride, strict=True))
    outer = [range(0, size * step, step) for size, step in zip(box.shape[:first], stride[:first], strict=True)]
    starts = (origin + sum(steps) for steps in itertools.product(*outer))
    return Runs(math.prod(box.shape[first:]), starts)
