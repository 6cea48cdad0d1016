"""Who fetches which bytes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scripted import RANGES_FIRST, ScriptedBody, ScriptedOrigin, broken, content_of, new_work

from rankload._fetch.origins.origin import Body, UnusableRange, Version
from rankload._fetch.transfer.failure_policy import Restart
from rankload._fetch.transfer.first_request import ByteRange
from rankload._fetch.transfer.state import TransferState
from rankload._platform.byte_ranges import ByteRanges
from rankload.errors import ContentChangedError, FetchError, HTTPStatusError, TruncatedError

CHUNK = RANGES_FIRST.chunk_bytes


class CountingFront:
    """A front that does not hash."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.covered = ByteRanges(ranges)

    @property
    def done_bytes(self) -> int:
        return self.covered.total_bytes

    def offer(self, offset: int, piece: bytes) -> None:
        self.covered.add(offset, offset + len(piece))


class Nowhere:
    """A target that only remembers what it was asked for."""

    rooms: tuple[tuple[Version, bool], ...] = ()

    def make_room(self, version: Version, *, is_resumable: bool) -> None:
        self.rooms = (*self.rooms, (version, is_resumable))


def work_over(size_bytes: int = 100_000, *there: tuple[int, int], **arguments: object) -> TransferState:
    origin = ScriptedOrigin(content_of(size_bytes))
    return new_work(origin, Nowhere(), CountingFront(*there), RANGES_FIRST, **arguments)


def body(state: TransferState, begin: int, end: int | None, **fields: object) -> Body:
    """What the origin answers; the fields are of its version."""
    content = state.origin.content  # type: ignore[attr-defined]
    version = replace(Version(len(content), '"1"'), **fields)
    if end is None:
        return ScriptedBody(content, version, 0, len(content), True)
    return ScriptedBody(content, version, begin, min(end, len(content)))


def begun(size_bytes: int = 100_000, streams: int = 1, **arguments: object) -> tuple[TransferState, list[str]]:
    """A work whose version is known, with streams at work that have taken nothing yet but the first chunk."""
    state = work_over(size_bytes, **arguments)
    names = [f"stream {number}" for number in range(streams)]
    assert state.enter(names[0])
    span = state.take(names[0], 0)
    state.admit(body(state, span.begin, span.end), span)
    state.target_streams = streams
    assert all(state.enter(name) for name in names[1:])
    return state, names


def test_one_stream_until_the_origin_has_answered():
    state = work_over()
    state.target_streams = 4
    assert state.enter("a") and not state.enter("b")
    span = state.take("a", 0)
    assert (span.begin, span.end) == (0, CHUNK)
    state.admit(body(state, 0, CHUNK), span)
    assert state.version.size_bytes == 100_000
    assert state.enter("b") and state.enter("c") and state.enter("d") and not state.enter("e")


@given(st.integers(1, 60_000), st.integers(1, 16), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_byte_is_given_to_exactly_one(size_bytes, streams, seed):
    source = random.Random(seed)
    assume(size_bytes != CHUNK)  # that is not believed of a first answer
    state, names = begun(size_bytes, 1)
    state.target_streams = streams
    names += [f"more {number}" for number in range(streams - 1)]
    given_out = [range(min(CHUNK, size_bytes))]
    active = [names[0], *(name for name in names[1:] if state.enter(name))]
    while active:
        name = source.choice(active)
        span = state.take(name, source.choice([0, 1e3, 1e5, 1e9]))
        if span is None:
            active.remove(name)
            continue
        assert span.begin < span.end <= size_bytes and span.end - span.begin <= 8 * CHUNK
        given_out.append(range(span.begin, span.end))
        if source.random() < 0.3:  # it breaks in the middle
            broken_at = source.randrange(span.begin, span.end)
            given_out[-1] = range(span.begin, broken_at)
            span.begin = broken_at
            state.give_back(span)
    offsets = [offset for one in given_out for offset in one]
    assert sorted(offsets) == list(range(size_bytes))


def begun_whole(size_bytes: int = 100_000) -> tuple[TransferState, ByteRange]:
    """A work whose first stream gets everything, and whose second one may begin."""
    state = new_work(ScriptedOrigin(content_of(size_bytes)), Nowhere(), CountingFront())
    assert state.enter("first")
    span = state.take("first", 0)
    assert (span.begin, span.end) == (0, None)
    state.admit(body(state, 0, None), span)
    assert span.end == size_bytes
    state.target_streams = 3
    return state, span


def test_others_share_the_first_range_once_one_of_them_is_answered():
    state, first = begun_whole()
    assert state.enter("second")
    probe = state.take("second", 0)
    assert (probe.begin, probe.end) == (CHUNK, 2 * CHUNK)
    assert first.end == 100_000 and not state.enter("fourth")
    state.admit(body(state, probe.begin, probe.end), probe)
    assert first.end == CHUNK
    given_out = [range(first.end), range(probe.begin, probe.end)]
    while (span := state.take("second", 0)) is not None:
        given_out.append(range(span.begin, span.end))
    assert sorted(offset for one in given_out for offset in one) == list(range(100_000))


@pytest.mark.parametrize(
    ("error", "may_ask_again"),
    [(HTTPStatusError("gone", code=404), False), (ContentChangedError("changed"), False), (broken(), True)],
)
def test_a_refusal_beside_the_first_answer_costs_nothing(error, may_ask_again):
    state, first = begun_whole()
    state.enter("second")
    probe = state.take("second", 0)
    assert state.pause_after("second", error, asked_at=0, has_moved=False) is None
    state.give_back(probe)
    assert (first.end, state.refusals, state.active_streams) == (100_000, 1, 1)
    assert state.enter("second") == may_ask_again


def test_a_senseless_range_beside_the_first_answer_costs_nothing():
    state, first = begun_whole()
    state.enter("second")
    probe = state.take("second", 0)
    assert state.pause_after_unusable_range("second", UnusableRange("nonsense")) is None
    state.give_back(probe)
    assert first.end == 100_000 and not state.enter("second")


def test_an_answer_that_comes_too_late_is_not_used():
    state, first = begun_whole()
    state.enter("second")
    probe = state.take("second", 0)
    first.begin = 3 * CHUNK
    state.admit(body(state, probe.begin, probe.end), probe)
    assert probe.begin == probe.end and first.end == 4 * CHUNK
    span = state.take("second", 0)
    assert span.begin == 4 * CHUNK


def test_what_the_first_stream_leaves_is_given_out_but_for_the_probe():
    state, first = begun_whole()
    state.enter("second")
    probe = state.take("second", 0)
    first.begin = 1000
    assert state.pause_after("first", broken(), asked_at=0, has_moved=False) is None
    state.give_back(first)
    state.admit(body(state, probe.begin, probe.end), probe)
    assert (probe.begin, probe.end) == (CHUNK, 2 * CHUNK)
    spans = [state.take("second", 0) for _ in range(2)]
    assert [(span.begin, span.end) for span in spans] == [(1000, CHUNK), (2 * CHUNK, 3 * CHUNK)]


def test_a_fast_stream_asks_for_more_and_the_last_portions_are_small():
    state, [name] = begun(100 * CHUNK)
    lengths = []
    while (span := state.take(name, 100 * CHUNK)) is not None:
        lengths.append((span.end - span.begin) // CHUNK)
    assert lengths[0] == 8 and lengths[-1] == 1 and lengths == sorted(lengths, reverse=True)


def test_a_stream_too_many_leaves_and_its_place_is_free():
    state, [first, second] = begun(streams=2)
    state.target_streams = 1
    assert state.take(second, 0) is None
    assert state.active_streams == 1
    assert state.take(first, 0) is not None
    assert state.take(second, 0) is None, "it has left"


def test_nothing_is_given_out_after_the_end():
    state, [name] = begun()
    state.fail(broken())
    assert state.take(name, 0) is None
    state, [name] = begun()
    state.stop()
    assert state.take(name, 0) is None
    with pytest.raises(Restart):
        state.admit(body(state, 0, CHUNK), ByteRange(0, CHUNK))


def test_the_first_failure_counts_and_none_after_the_end():
    state, _ = begun()
    first, second = broken("first"), broken("second")
    state.fail(first)
    state.fail(second)
    assert state.failure is first
    state, _ = begun()
    state.stop()
    state.fail(first)
    assert state.failure is None


def test_complete_when_all_has_come():
    state, _ = begun(1000)
    state.accept(0, b"x" * 999)
    assert not state.is_complete()
    state.accept(999, b"x")
    assert state.is_complete()


def test_all_was_there():
    known = Version(1000, '"1"')
    state = work_over(1000, (0, 1000), known=known)
    assert state.is_complete() and not state.enter("a")
    assert not work_over(1000, (0, 999), known=known).is_complete()


def test_what_was_there_is_not_asked_for():
    state = work_over(20_000, (0, 5000), (7000, 12_000), known=Version(20_000, '"1"'))
    assert state.expected == Version(20_000, '"1"')
    assert state.enter("a")
    span = state.take("a", 0)
    assert (span.begin, span.end) == (5000, 7000)
    state.admit(body(state, 5000, 7000), span)
    span = state.take("a", 0)
    assert (span.begin, span.end) == (12_000, 16_000)


@pytest.mark.parametrize(
    ("fields", "has_digest", "is_split"),
    [
        ({}, False, True),
        ({"etag": None, "last_modified": "a date"}, False, True),
        ({"etag": None}, False, False),
        ({"etag": None}, True, True),
        ({"size_bytes": None}, True, False),
    ],
)
def test_ranges_only_where_a_change_would_show(fields, has_digest, is_split):
    state = work_over(has_digest=has_digest)
    state.enter("a")
    state.take("a", 0)
    if is_split:
        state.admit(body(state, 0, CHUNK, **fields), ByteRange(0, CHUNK))
        assert [is_resumable for _, is_resumable in state.target.rooms] == [True]
    else:
        with pytest.raises(Restart) as caught:
            state.admit(body(state, 0, CHUNK, **fields), ByteRange(0, CHUNK))
        assert caught.value.is_whole and caught.value.error is None and state.target.rooms == ()


def test_a_file_of_one_chunk_needs_no_validator():
    state = work_over(1000)
    state.enter("a")
    state.take("a", 0)
    state.admit(body(state, 0, CHUNK, etag=None), ByteRange(0, CHUNK))
    assert [is_resumable for _, is_resumable in state.target.rooms] == [False]


def test_an_origin_that_sends_everything_has_one_stream_and_an_end_of_its_own():
    state = work_over(50_000)
    state.enter("a")
    state.take("a", 0)
    state.admit(body(state, 0, None), ByteRange(0, CHUNK))
    state.target_streams = 8
    assert state.is_whole and not state.enter("b")
    state.accept(0, bytes(50_000))
    assert not state.is_complete()
    state.ended()
    assert state.is_complete()


def test_whole_failures_start_over_after_a_pause_and_no_more_often_than_others():
    state, [name] = begun(is_whole=True)
    for _ in range(RANGES_FIRST.retries):
        with pytest.raises(Restart) as caught:
            state.pause_after(name, TruncatedError("cut"), asked_at=9e99, has_moved=True)
        assert caught.value.is_whole and caught.value.pause_seconds > 0
    with pytest.raises(TruncatedError):
        state.pause_after(name, TruncatedError("cut"), asked_at=9e99, has_moved=True)


def test_a_changed_file_starts_over():
    state, [name] = begun()
    with pytest.raises(Restart) as caught:
        state.pause_after(name, ContentChangedError("changed"), asked_at=0, has_moved=False)
    assert isinstance(caught.value.error, ContentChangedError) and not caught.value.is_whole


def test_of_several_streams_that_get_nothing_all_but_the_last_leave():
    state, names = begun(streams=3)
    assert state.pause_after(names[2], broken(), asked_at=0, has_moved=False) is None
    assert state.pause_after(names[0], broken(), asked_at=0, has_moved=False) is None
    assert (state.active_streams, state.refusals) == (1, 2)
    assert state.pause_after(names[1], broken(), asked_at=9e99, has_moved=False) > 0


def test_the_last_ones_failures_count_until_there_are_enough():
    state, [name] = begun()
    for _ in range(RANGES_FIRST.retries):
        state.pause_after(name, broken(), asked_at=9e99, has_moved=False)
    with pytest.raises(FetchError):
        state.pause_after(name, broken(), asked_at=9e99, has_moved=False)


def test_an_origin_that_cuts_every_connection_is_borne_with_as_long_as_bytes_come():
    state, [name] = begun(10_000_000)
    for number in range(50):
        state.accept(number * (64 << 10), bytes(64 << 10))
        assert state.pause_after(name, TruncatedError("cut"), asked_at=9e99, has_moved=True) > 0


def test_retry_after_holds_for_all_streams():
    state, names = begun(streams=2)
    busy = HTTPStatusError("busy", code=429, retry_after_seconds=20.0)
    assert state.hold_seconds() == 0
    assert state.pause_after(names[1], busy, asked_at=0, has_moved=False) is None
    assert 19 < state.hold_seconds() <= 20


def test_two_nonsensical_ranges_and_no_more_are_asked_for():
    state, _ = begun()
    state.count_unusable_range(UnusableRange("nonsense"))
    with pytest.raises(Restart) as caught:
        state.count_unusable_range(UnusableRange("nonsense"))
    assert caught.value.is_whole


def test_a_nonsensical_range_now_and_then_is_borne_with():
    state, _ = begun(10_000_000)
    for number in range(50):
        state.count_unusable_range(UnusableRange("nonsense"))
        state.accept(number * (64 << 10), bytes(64 << 10))
