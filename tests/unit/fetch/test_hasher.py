"""The hash behind the transfer: whatever the order, it is hashlib's."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import content_of, threads_named

from harness.waiting import wait_until
from rankload._fetch.transfer import hasher as module
from rankload._fetch.transfer.hasher import OrderedHasher
from rankload.errors import CacheError

CONTENT = content_of(300_000)


def started(descriptor: int) -> OrderedHasher:
    hasher = OrderedHasher(descriptor)
    hasher.start()
    return hasher


def ignore(done_bytes: int) -> None:
    pass


@pytest.fixture
def descriptor(tmp_path):
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield number
    os.close(number)
    assert threads_named("rankload-digest") == []


def write_and_offer(hasher: OrderedHasher, descriptor: int, begin: int, end: int) -> None:
    os.pwrite(descriptor, CONTENT[begin:end], begin)
    hasher.offer(begin, CONTENT[begin:end])


@pytest.mark.parametrize("memory_bytes", [64 << 20, 20_000, 0])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_in_any_order(descriptor, monkeypatch, memory_bytes, seed):
    """Also more of them than may wait in memory: these are read back."""
    monkeypatch.setattr(module, "_MEMORY_BYTES", memory_bytes)
    monkeypatch.setattr(module, "_READ_BYTES", 7000)
    source = random.Random(seed)
    cuts = sorted({0, len(CONTENT), *(source.randrange(len(CONTENT)) for _ in range(100))})
    pieces = list(itertools.pairwise(cuts))
    source.shuffle(pieces)
    hasher = started(descriptor)
    for begin, end in pieces:
        write_and_offer(hasher, descriptor, begin, end)
    assert hasher.done_bytes == len(CONTENT)
    assert hasher.finish(ignore, 30) == hashlib.sha256(CONTENT).hexdigest()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_pieces_beside_what_was_there(tmp_path_factory, order, adopted):
    path = tmp_path_factory.mktemp("front") / "file"
    path.write_bytes(CONTENT[:12_000])
    number = os.open(path, os.O_RDWR)
    try:
        hasher = started(number)
        for index in order:
            begin, end = index * 1000, index * 1000 + 1000
            if index in adopted:
                hasher.adopt(begin, end)
            else:
                write_and_offer(hasher, number, begin, end)
        assert hasher.finish(ignore, 30) == hashlib.sha256(CONTENT[:12_000]).hexdigest()
    finally:
        os.close(number)


def test_many_threads_offer(descriptor):
    hasher = started(descriptor)
    barrier = threading.Barrier(8)

    def offer_every_eighth(first):
        barrier.wait()
        for index in range(first, 300, 8):
            write_and_offer(hasher, descriptor, index * 1000, index * 1000 + 1000)

    threads = [threading.Thread(target=offer_every_eighth, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hasher.finish(ignore, 30) == hashlib.sha256(CONTENT).hexdigest()


def test_of_nothing(descriptor):
    assert started(descriptor).finish(ignore, 30) == hashlib.sha256().hexdigest()


def test_memory_that_waits_is_bounded(descriptor, monkeypatch):
    monkeypatch.setattr(module, "_MEMORY_BYTES", 10_000)
    hasher = started(descriptor)
    for begin in range(1000, len(CONTENT), 1000):  # all but the first
        write_and_offer(hasher, descriptor, begin, begin + 1000)
        assert sum(map(len, hasher._pieces.values())) == hasher._memory_bytes <= 10_000
    write_and_offer(hasher, descriptor, 0, 1000)
    assert hasher.finish(ignore, 30) == hashlib.sha256(CONTENT).hexdigest()
    assert (hasher._pieces, hasher._memory_bytes) == ({}, 0)


def test_it_tells_how_far_it_is(descriptor, monkeypatch):
    monkeypatch.setattr(module, "_READ_BYTES", 100_000)
    reads, told = [], []
    goes_on = threading.Event()
    preadv = os.preadv

    def slow(*arguments):
        goes_on.wait(30)
        reads.append(1)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    os.pwrite(descriptor, CONTENT, 0)
    hasher = started(descriptor)
    hasher.adopt(0, len(CONTENT))

    def on_bytes(done_bytes):
        told.append(done_bytes)
        goes_on.set()

    assert hasher.finish(on_bytes, 30) == hashlib.sha256(CONTENT).hexdigest()
    assert told[0] == 0 and told == sorted(told) and len(reads) == 3


def test_what_on_bytes_raises_comes_through_and_the_thread_can_be_ended(descriptor, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(os, "preadv", lambda *_: goes_on.wait(30) and 0)
    hasher = started(descriptor)
    hasher.adopt(0, 1000)

    def on_bytes(done_bytes):
        raise CacheError("another rank's")

    with pytest.raises(CacheError, match="another rank's"):
        hasher.finish(on_bytes, 30)
    hasher.abort()  # does not wait for a disk that does not answer
    [thread] = threads_named("rankload-digest")
    goes_on.set()
    thread.join(30)


def test_abort_at_any_time(descriptor):
    hasher = started(descriptor)
    write_and_offer(hasher, descriptor, 1000, 2000)
    hasher.abort()
    hasher.abort()
    hasher.offer(0, CONTENT[:1000])
    assert threads_named("rankload-digest") == []


def test_abort_of_what_was_never_started(descriptor):
    hasher = OrderedHasher(descriptor)
    hasher.adopt(0, 10)
    hasher.abort()


def test_an_interrupt_while_it_starts(descriptor, monkeypatch):
    """The thread is there, but start() has not come back: it ends all the same."""

    class Interrupted(BaseException):
        pass

    def wait(self, timeout=None):
        raise Interrupted

    hasher = OrderedHasher(descriptor)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Event, "wait", wait)
        with pytest.raises(Interrupted):
            hasher.start()
    hasher.abort()
    wait_until(lambda: not threads_named("rankload-digest"), 10, "the thread ends")


def test_file_that_cannot_be_read_back(descriptor, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    hasher = started(descriptor)
    hasher.adopt(0, 1000)
    with pytest.raises(CacheError, match="read back the downloaded bytes") as caught:
        hasher.finish(ignore, 30)
    assert caught.value.errno == 5


def test_file_that_is_shorter_than_what_was_written(descriptor):
    os.pwrite(descriptor, CONTENT[:500], 0)
    hasher = started(descriptor)
    hasher.adopt(0, 1000)
    with pytest.raises(CacheError, match="the file ends at 500"):
        hasher.finish(ignore, 30)


def test_disk_that_never_answers_is_not_waited_for(descriptor, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(os, "preadv", lambda *arguments: released.wait(60) and 0)
    hasher = started(descriptor)
    hasher.adopt(0, 1000)
    with pytest.raises(CacheError, match=r"the disk has not answered for 0.2 s"):
        hasher.finish(ignore, 0.2)
    released.set()
    hasher.abort()
    wait_until(lambda: not threads_named("rankload-digest"), 30, "the thread ends")
