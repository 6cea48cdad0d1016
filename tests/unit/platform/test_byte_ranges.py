"""Sets of byte ranges, against sets of ints."""

from __future__ import annotations

import itertools
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from rankload._platform.byte_ranges import ByteRanges

OFFSETS = st.integers(0, 40)
OPERATIONS = st.lists(st.tuples(st.sampled_from(["add", "remove"]), OFFSETS, OFFSETS), max_size=30)


def model_of(operations):
    """The spans after these operations, and the same as a set of offsets."""
    spans, model = ByteRanges(), set()
    for operation, begin, end in operations:
        getattr(spans, operation)(begin, end)
        if operation == "add":
            model |= set(range(begin, end))
        else:
            model -= set(range(begin, end))
    return spans, model


@settings(max_examples=500)
@given(OPERATIONS)
def test_ranges_are_those_of_the_set(operations):
    spans, model = model_of(operations)
    ranges = list(spans)
    assert {offset for begin, end in ranges for offset in range(begin, end)} == model
    assert spans.total_bytes == len(model)
    assert all(begin < end for begin, end in ranges)
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(ranges)), "some touch"
    assert list(ByteRanges(reversed(ranges))) == ranges


@settings(max_examples=500)
@given(OPERATIONS, OFFSETS)
def test_end_of_a_range(operations, offset):
    spans, model = model_of(operations)
    end = offset
    while end in model:
        end += 1
    assert spans.end_of(offset) == end


@settings(max_examples=500)
@given(OPERATIONS, st.none() | OFFSETS)
def test_first_gap(operations, limit):
    spans, model = model_of(operations)
    begin = 0
    while begin in model:
        begin += 1
    end = next((offset for offset in range(begin, 50) if offset in model), None)
    if limit is not None:
        begin, end = min(begin, limit), limit if end is None else min(end, limit)
    assert spans.first_gap(limit) == (begin, end)


@given(OPERATIONS)
def test_all_gaps_are_found_one_after_the_other(operations):
    spans, model = model_of(operations)
    found = set()
    while (gap := spans.first_gap(41))[0] != gap[1]:
        assert found.isdisjoint(range(*gap)) and model.isdisjoint(range(*gap))
        found |= set(range(*gap))
        spans.add(*gap)
    assert found | model >= set(range(41))


def test_iterating_is_over_a_copy():
    spans = ByteRanges([(0, 1), (3, 4)])
    for begin, end in spans:
        spans.remove(begin, end)
    assert list(spans) == [] and spans.total_bytes == 0
    assert repr(ByteRanges([(1, 2)])) == "ByteRanges([(1, 2)])"


def test_the_total_never_falls_while_ranges_are_added():
    """Another thread looks at it all the time: a number that falls for a moment would look like a rate."""
    spans, has_ended, falls = ByteRanges(), threading.Event(), []

    def watch():
        seen = 0
        while not has_ended.is_set():
            total = spans.total_bytes
            if total < seen:
                falls.append((seen, total))
            seen = total

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(20_000):
        spans.add(number * 10, number * 10 + 10)
    has_ended.set()
    watcher.join()
    assert falls == []
