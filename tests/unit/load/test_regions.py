"""Which elements of a contiguous tensor a part of it is made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankload._load.module.regions import Region, intersection, regions_of_range, runs, whole


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    offset = tuple(draw(st.integers(0, size)) for size in shape)
    return shape, Region(offset, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offset, strict=True)))


@given(shapes_and_boxes())
def test_runs_are_the_elements_of_the_box_in_their_order(shape_and_box: tuple[tuple[int, ...], Region]) -> None:
    shape, region = shape_and_box
    part = tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for dimension, (start, size) in enumerate(zip(region.offset, region.shape, strict=True)):
        part = part.narrow(dimension, start, size)
    found = runs(shape, region)
    assert [
        tensor.flatten()[start + i] for start in found.starts for i in range(found.length)
    ] == part.flatten().tolist()


@pytest.mark.parametrize(
    ("shape", "region", "length", "starts"),
    [
        ((6, 4), whole((6, 4)), 24, [0]),
        ((6, 4), Region((2, 0), (2, 4)), 8, [8]),  # rows
        ((6, 4), Region((0, 2), (6, 2)), 2, [2, 6, 10, 14, 18, 22]),  # columns
        ((2, 3, 4), Region((1, 1, 0), (1, 2, 4)), 8, [16]),  # rows of one matrix
        ((2, 3, 4), Region((0, 1, 0), (2, 2, 4)), 8, [4, 16]),
        ((), whole(()), 1, [0]),
        ((3, 0), whole((3, 0)), 0, []),
    ],
)
def test_runs_are_as_long_as_can_be(shape: tuple[int, ...], region: Region, length: int, starts: list[int]) -> None:
    found = runs(shape, region)
    assert (found.length, list(found.starts)) == (length, starts)


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.data())
def test_boxes_of_a_range_are_its_elements_in_their_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    begin = data.draw(st.integers(0, tensor.numel()))
    end = data.draw(st.integers(begin, tensor.numel()))
    found = []
    regions = list(regions_of_range(shape, begin, end))
    for region, first in regions:
        assert first == begin + len(found)
        found += tensor[
            tuple(slice(at, at + size) for at, size in zip(region.offset, region.shape, strict=True))
        ].flatten()
    assert found == list(range(begin, end))
    assert len(regions) <= max(1, 2 * len(shape) - 1)


@given(shapes_and_boxes(), st.data())
def test_intersection_is_what_both_have(shape_and_box: tuple[tuple[int, ...], Region], data: st.DataObject) -> None:
    shape, region = shape_and_box
    offset = tuple(data.draw(st.integers(0, size)) for size in shape)
    other = Region(offset, tuple(data.draw(st.integers(0, size - at)) for size, at in zip(shape, offset, strict=True)))
    common = intersection(region, other)
    marks = torch.zeros(shape, dtype=torch.int)
    for part in (region, other):
        marks[tuple(slice(at, at + size) for at, size in zip(part.offset, part.shape, strict=True))] += 1
    if common is None:
        assert not (marks == 2).any()
    else:
        marks[tuple(slice(at, at + size) for at, size in zip(common.offset, common.shape, strict=True))] -= 2
        assert not (marks == 2).any() and (marks >= 0).all()
