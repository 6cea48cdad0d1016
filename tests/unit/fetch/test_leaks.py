"""What a fetch must give back, however it ends: descriptors, threads, connections, memory."""

from __future__ import annotations

import gc
import os
import resource
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from scripted import content_of

from harness.origin import Reply
from harness.waiting import wait_until
from rankload import dist_fetch
from rankload._fetch.origins.http import HttpOrigin
from rankload._settings import Settings
from rankload._urls import Url
from rankload.errors import RankloadError

RUNS = 40


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("rankload")}


@pytest.fixture
def many_streams(monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", "20000")
    monkeypatch.setenv("RANKLOAD_RETRIES", "1")
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.001")


@pytest.mark.parametrize(
    "replies",
    [
        (Reply(),),
        (Reply(status=404),),
        (Reply(), Reply(status=500)),
        (Reply(), Reply(reset_at=100)),
        (Reply(ranges="ignored", truncate_at=5000),),
        (Reply(), Reply(ranges="no-content-range")),
        (Reply(etag='"1"'), Reply(etag='"2"')),
        (Reply.html_page(),),
    ],
    ids=["good", "absent", "failing", "reset", "cut", "nonsense", "changing", "page"],
)
def test_nothing_is_left_open(origin, tmp_path, many_streams, replies):
    content = content_of(200_000)
    origin.add("file.bin", content)
    dist_fetch(origin.url("file.bin"), tmp_path / "first")  # opens what stays open: epoll, urandom, …
    origin.wait_until_idle()
    wait_until(lambda: not origin._connections, 10, "the first connections are closed")
    before, others = descriptors(), threads()  # of other tests in this process
    for number in range(RUNS):
        url = origin.add("file.bin", content, *replies)
        with suppress(RankloadError):
            dist_fetch(url, tmp_path / str(number), sha256="0" * 64 if replies[0].body else None)
    wait_until(lambda: not threads() - others, 10, "no threads are left")
    wait_until(lambda: not origin._connections, 10, "all connections are closed")
    assert descriptors() <= before


def test_threads_that_come_and_go_share_connections(origin):
    url = origin.add("file.bin", content_of(50_000))
    http = HttpOrigin(Url.parse(url), (), Settings())

    def fetch():
        with http.open(1000, 2000, None) as body:
            while body.read():
                pass

    for _ in range(20):
        thread = threading.Thread(target=fetch)
        thread.start()
        thread.join()
    assert origin.request_count() == 20
    assert len(origin._connections) == 1
    http.close()


def test_no_descriptor_is_left_for_the_file(origin, tmp_path, monkeypatch):
    """EMFILE is an error of ours like any other that a disk gives."""
    url = origin.add("file.bin", content_of(50_000))
    dup = os.dup

    def no_more(descriptor):
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(os, "dup", no_more)
    with pytest.raises(RankloadError, match="Too many open files"):
        dist_fetch(url, tmp_path)
    monkeypatch.setattr(os, "dup", dup)
    assert dist_fetch(url, tmp_path).read_bytes() == content_of(50_000)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(origin, tmp_path):
    """64 MiB of pieces may wait for the hash; beside them there is a buffer for each stream, and little else."""
    size_bytes = 1 << 30
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(size_bytes)  # zeros, as sparse as on the disk that it comes from
    url = origin.add("file.bin", source)
    peak = [0]
    has_ended = threading.Event()

    def watch():
        while not has_ended.wait(0.02):
            peak[0] = max(peak[0], _anonymous_bytes())

    before = _anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        path = dist_fetch(url, tmp_path / "cache")
    finally:
        has_ended.set()
        watcher.join()
    assert path.stat().st_size == size_bytes
    assert peak[0] - before < 160 << 20, f"{(peak[0] - before) >> 20} MiB"


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
