"""The deadlines of a small read, by a clock of the test's own; and how much is allocated ahead of the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankload._fetch.bounded_read import ReadDeadline
from rankload._fetch.partials.room import Room
from rankload.errors import FetchTimeoutError

KIB, MIB = 1 << 10, 1 << 20
LIMIT = 100.0


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def scaler(bytes_per_second: float, total_bytes: int) -> tuple[float, bool]:
    """When a read that goes at this pace ends, and whether it has everything."""
    clock = Clock()
    deadline, received = ReadDeadline("url", LIMIT, clock), 0
    while received < total_bytes:
        clock.seconds += 1
        received = min(total_bytes, int(bytes_per_second * clock.seconds))
        try:
            deadline.check(received)
        except FetchTimeoutError:
            return clock.seconds, False
    return clock.seconds, True


@pytest.mark.parametrize("total_bytes", [64 * KIB, 4 * MIB, 1 << 40])
def test_trickle_ends_with_the_deadline_however_much_is_asked_for(total_bytes):
    assert scaler(2, total_bytes) == (LIMIT + 1, False)


def test_slow_link_may_take_as_long_as_it_needs():
    assert scaler(5 * KIB, 50 * MIB) == (10 * KIB, True)


def test_small_answer_takes_no_longer_than_the_deadline_on_no_progress():
    ends_at, is_complete = scaler(64 * KIB / (LIMIT + 2), 64 * KIB)
    assert ends_at <= LIMIT + 1 and not is_complete


def test_burst_that_stops_is_no_progress():
    clock = Clock()
    deadline = ReadDeadline("url", LIMIT, clock)
    clock.seconds = 1
    deadline.check(100 * MIB)
    clock.seconds = LIMIT + 1
    deadline.check(100 * MIB)
    clock.seconds = LIMIT + 1.1
    with pytest.raises(FetchTimeoutError, match="not a byte came within the deadline of 100 s"):
        deadline.check(100 * MIB)


def test_pauses_between_tries_do_not_count_but_tries_add_up():
    clock = Clock()
    deadline = ReadDeadline("url", LIMIT, clock)
    for _ in range(2):
        clock.seconds += 1000
        deadline.start_try()
        clock.seconds += LIMIT / 2
        deadline.check(0)
    clock.seconds += 1
    with pytest.raises(FetchTimeoutError, match="not a byte came"):
        deadline.check(0)


@given(st.integers(0, 1 << 44), st.lists(st.integers(0, 1 << 40)))
def test_room_grows_with_what_arrives(size_bytes, steps):
    room, allocated, arrived = Room(size_bytes), 0, 0
    for step in [0, *steps]:
        arrived = min(size_bytes, arrived + step)
        begin, end = room.grown(arrived)
        assert begin == allocated <= end <= size_bytes
        allocated = end
        assert min(size_bytes, max(64 * MIB, 2 * arrived)) <= allocated <= max(64 * MIB, 4 * arrived)


def test_room_of_a_small_file_is_taken_at_once_and_only_once():
    room = Room(8 * MIB)
    assert [room.grown(arrived) for arrived in (0, MIB, 8 * MIB)] == [(0, 8 * MIB)] + [(8 * MIB, 8 * MIB)] * 2
