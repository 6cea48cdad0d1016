"""Streams over one file: what the many of them must not do to each other."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from scripted import (
    SETTINGS,
    ScriptedOrigin,
    broken,
    content_in,
    content_of,
    new_partial,
    new_work,
    run,
    threads_named,
)

from rankload._fetch.partials.writer import PartialWriter
from rankload._fetch.transfer.hasher import OrderedHasher
from rankload.errors import FetchError


@pytest.fixture
def partial(tmp_path):
    with new_partial(tmp_path) as one:
        yield one


@pytest.fixture
def hasher(partial):
    one = OrderedHasher(partial.descriptor)
    one.start()
    yield one
    one.abort()


def test_all_bytes_come(partial, hasher):
    content = content_of(100_000)
    run(new_work(ScriptedOrigin(content), partial, hasher))
    assert content_in(partial) == content
    assert threads_named("rankload-stream") == []


def test_a_stream_that_was_turned_away_asks_for_nothing_more(partial, hasher):
    """It left its place to the others; going on, it would knock at the origin's door without a pause."""
    content = content_of(4000 * 16)
    release = threading.Event()
    refused = []

    def before_read(offset):
        if offset:
            release.wait(30)

    def answer(begin, end):
        if begin and not release.is_set():
            refused.append(threading.current_thread())
            return broken("too many")
        return None

    def report(progress):
        # the stream that was let in stands still: up to three others are turned away
        if refused and (not any(thread.is_alive() for thread in refused) or len(refused) > 3):
            release.set()

    run(new_work(ScriptedOrigin(content, before_read, answer), partial, hasher), report, streams=4)
    assert content_in(partial) == content
    assert len(refused) == len(set(refused)) <= 3


def test_a_failure_of_all_streams_at_once_is_one_failure(partial, hasher):
    """A switch is restarted, a server too: every connection breaks in the same moment, and none has moved since."""
    content = content_of(4000 * 40)
    has_broken = threading.Event()
    at_the_gate = threading.Barrier(8, has_broken.set)  # set before anybody passes: who tries again must not wait here

    def before_read(offset):
        if offset % 4000 == 2000 and offset > 4000 and not has_broken.is_set():
            at_the_gate.wait(30)
            raise broken()

    settings = type(SETTINGS)(chunk_bytes=4000, streams=8, retries=3, backoff_seconds=0.001)
    state = new_work(ScriptedOrigin(content, before_read), partial, hasher, settings)
    run(state, streams=8)
    assert has_broken.is_set()
    assert content_in(partial) == content


def test_what_a_stream_left_behind_brings_is_not_written_any_more(partial):
    """Some filesystems' reads cannot be broken off: one comes back when the file is being fetched anew."""
    old, new = content_of(4000, seed=1), content_of(4000, seed=2)
    is_reading, goes_on = threading.Event(), threading.Event()

    def before_read(offset):
        if offset == 1000:
            is_reading.set()
            goes_on.wait(30)

    def report(progress):
        if is_reading.is_set():
            raise FetchError("another rank's")

    hasher = OrderedHasher(partial.descriptor)
    hasher.start()
    with suppress(FetchError):
        run(new_work(ScriptedOrigin(old, before_read), partial, hasher), report)
    hasher.abort()
    [left_behind] = threads_named("rankload-stream")

    partial.clear()
    hasher = OrderedHasher(partial.descriptor)
    hasher.start()
    run(new_work(ScriptedOrigin(new, etag='"2"'), partial, hasher))
    spans = list(partial.spans)
    goes_on.set()
    left_behind.join(30)
    hasher.abort()
    assert content_in(partial) == new
    assert list(partial.spans) == spans


def test_an_interrupt_while_a_stream_starts_is_what_is_raised(partial, hasher, monkeypatch):
    class Interrupted(BaseException):
        pass

    def start(self):
        raise Interrupted

    monkeypatch.setattr("rankload._fetch.transfer.stream.Stream.start", start)
    with pytest.raises(Interrupted):
        run(new_work(ScriptedOrigin(content_of(9000)), partial, hasher))


def test_threads_that_cannot_be_started_are_done_without(partial, hasher, monkeypatch):
    """A limit on processes, as clusters set it: one stream is slow, but it gets there."""
    content, started = content_of(4000 * 30), []
    start = threading.Thread.start

    def start_one(self):
        if self.name == "rankload-stream" and started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    state = new_work(ScriptedOrigin(content), partial, hasher)
    run(state, streams=4)
    assert content_in(partial) == content


def test_what_is_hashed_is_what_is_in_the_file(partial, hasher, monkeypatch):
    """An origin that answers while a piece is being written sends other bytes for the second half of that piece."""
    content, others = content_of(60_000), content_of(60_000, seed=1)
    settings = replace(SETTINGS, chunk_bytes=4567)  # no multiple of a piece
    asked, is_writing, is_shared, is_written = (threading.Event() for _ in range(4))
    probes: list[int] = []

    class Lying(ScriptedOrigin):
        @contextmanager
        def open(self, begin, end, version):
            if begin and not probes:
                probes.append(begin)
                asked.set()
                is_writing.wait(10)
            with super().open(begin, end, version) as body:
                body.content = others if begin else content
                yield body

    def before_read(offset):
        if offset >= 2000:
            asked.wait(10)
        if offset in probes:
            is_shared.set()
            is_written.wait(10)

    def write(writer, piece, offset):
        if probes and offset < probes[0] < offset + len(piece):
            is_writing.set()
            is_shared.wait(1)
            written(writer, piece, offset)
            is_written.set()
        else:
            written(writer, piece, offset)

    written = PartialWriter.write
    monkeypatch.setattr(PartialWriter, "write", write)
    origin = Lying(content, before_read=before_read)
    run(new_work(origin, partial, hasher, settings), streams=2)
    assert is_writing.is_set()
    assert hasher.finish(lambda count: None, 10) == hashlib.sha256(content_in(partial)).hexdigest()
    assert all(end is None or begin < end for begin, end in origin.requests)


def test_a_small_file_waits_for_no_tick(partial, hasher):
    fastest = 9.0
    for _ in range(5):
        began_at = time.monotonic()
        partial.clear()
        one = OrderedHasher(partial.descriptor)
        one.start()
        run(new_work(ScriptedOrigin(content_of(3000)), partial, one))
        one.finish(lambda done: None, 30)
        fastest = min(fastest, time.monotonic() - began_at)
    assert fastest < 0.08
