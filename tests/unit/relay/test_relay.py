"""Connections between neighbours, and bytes on their way through."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from rankload._relay import relay as relay_module
from rankload._relay.blocks import BytesBlock, FileBlock
from rankload._relay.handshake import HELLO_BYTES, UpstreamHandshake
from rankload._relay.links import Link, connect
from rankload._relay.listener import Listener
from rankload._relay.relay import Relay
from rankload._types import Progress
from rankload.errors import CoordinationError, LoadError, ProgressTimeoutError, RankLostError


@pytest.fixture
def closing_all() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def chain(count: int, stack: ExitStack, progress_seconds: float = 60.0) -> list[Relay]:
    """Relays in a row, as of ranks 0, 1, …"""
    upstreams: list[Link | None] = [None]
    downstreams: list[list[Link]] = []
    for rank in range(count - 1):
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
            stack.enter_context(end)
        downstreams.append([Link(rank + 1, "there", ends[0])])
        upstreams.append(Link(rank, "here", ends[1]))
    return [
        Relay(upstream, downstream, lambda progress: None, progress_seconds, bytes(32))
        for upstream, downstream in zip(upstreams, [*downstreams, []], strict=True)
    ]


def received(relay: Relay, lengths: list[int]) -> bytes:
    result = b""
    for length in lengths:
        relay.receive(memoryview(part := bytearray(length)))
        result += part
    return result


@pytest.mark.parametrize("lengths", [[0], [1], [100, 0, 5], [3_000_000, 7, 600_000]])
@pytest.mark.parametrize("is_file", [False, True])
def test_all_get_what_the_source_sends(
    closing_all: ExitStack, tmp_path: Path, lengths: list[int], is_file: bool
) -> None:
    content = random.Random(1).randbytes(sum(lengths))
    (tmp_path / "content").write_bytes(b"before" + content)
    file = closing_all.enter_context((tmp_path / "content").open("rb"))
    source, *others = chain(4, closing_all)
    with ThreadPoolExecutor() as pool:
        results = [pool.submit(received, relay, lengths) for relay in others]
        begin = 0
        for length in lengths:
            block = (
                FileBlock(file.fileno(), 6 + begin, length)
                if is_file
                else BytesBlock(memoryview(content)[begin : begin + length])
            )
            source.send(block)
            begin += length
        assert [result.result(20) for result in results] == [content] * 3
    assert {relay.bytes_passed for relay in (source, *others)} == {len(content)}


def test_source_without_anybody_sends_to_nobody(closing_all: ExitStack) -> None:
    [source] = chain(1, closing_all)
    source.send(BytesBlock(memoryview(b"content")))


def test_file_that_cannot_be_read_or_was_cut_off(closing_all: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(bytes(100))
    file = closing_all.enter_context((tmp_path / "content").open("rb"))
    source, _ = chain(2, closing_all)
    with pytest.raises(LoadError, match="shorter"):
        source.send(FileBlock(file.fileno(), 0, 101))
    with pytest.raises(LoadError, match="cannot read"):
        source.send(FileBlock(os.pipe()[0], 0, 1))


@pytest.mark.parametrize("is_source", [False, True])
def test_broken_connection_names_the_other_rank(
    closing_all: ExitStack, monkeypatch: pytest.MonkeyPatch, is_source: bool
) -> None:
    monkeypatch.setattr(relay_module, "WORD_SECONDS", 0.2)
    source, other = chain(2, closing_all)
    if is_source:
        assert other.upstream is not None
        other.upstream.socket.close()
        with pytest.raises(RankLostError, match="rank 1 on there broke"):
            source.send(BytesBlock(memoryview(bytes(1 << 20))))
    else:
        source.downstreams[0].socket.close()
        with pytest.raises(RankLostError, match=r"rank 0 on here broke \(closed\)"):
            other.receive(memoryview(bytearray(1)))


def test_reason_that_comes_after_the_break_is_the_one_that_counts(closing_all: ExitStack) -> None:
    source, other = chain(2, closing_all)
    source.downstreams[0].socket.close()
    began_at = time.monotonic()

    def watch(progress: Progress) -> None:
        if time.monotonic() - began_at > 0.3:
            raise LoadError("why it left")

    other._watch = watch
    with pytest.raises(LoadError, match="why it left"):
        other.receive(memoryview(bytearray(1)))


def test_no_byte_for_too_long(closing_all: ExitStack) -> None:
    _, other = chain(2, closing_all, progress_seconds=0.5)
    with pytest.raises(ProgressTimeoutError, match="rank 0 on here"):
        other.receive(memoryview(bytearray(1)))


# --- connections ------------------------------------------------------------------------------------------------------


def test_strangers_are_turned_away() -> None:
    with closing(Listener(["127.0.0.1"])) as listener, ThreadPoolExecutor() as pool:
        result = pool.submit(listener.accept, 0, "here", lambda: None)
        address = ("127.0.0.1", listener.way["port"])
        with socket.create_connection(address) as silent, socket.create_connection(address) as stranger:
            silent.close()
            stranger.sendall(bytes(HELLO_BYTES))
            assert stranger.recv(1) == b""  # closed
        with connect(1, "there", listener.way, 5, lambda: None).socket as ours, result.result(10).socket as theirs:
            assert _are_connected(ours, theirs)


def test_silent_and_slow_strangers_keep_nobody_waiting() -> None:
    with closing(Listener(["127.0.0.1"])) as listener, ThreadPoolExecutor() as pool, ExitStack() as strangers:
        address = ("127.0.0.1", listener.way["port"])
        for said in (b"", b"", UpstreamHandshake(bytes.fromhex(listener.way["key"])).hello[:3]):
            strangers.enter_context(socket.create_connection(address)).sendall(said)
        result = pool.submit(listener.accept, 0, "here", _limit(20))
        began_at = time.monotonic()
        with connect(1, "there", listener.way, 20, lambda: None).socket as ours, result.result(20).socket as theirs:
            assert time.monotonic() - began_at < 4
            assert _are_connected(ours, theirs)


def test_connection_that_upstream_has_given_up_is_not_taken() -> None:
    """Downstream comes to accept late: upstream has asked, waited, and connected anew."""
    with closing(Listener(["127.0.0.1"])) as listener, ThreadPoolExecutor() as pool:
        with socket.create_connection(("127.0.0.1", listener.way["port"])) as given_up:
            given_up.sendall(UpstreamHandshake(bytes.fromhex(listener.way["key"])).hello)
        result = pool.submit(listener.accept, 0, "here", _limit(20))
        with connect(1, "there", listener.way, 20, lambda: None).socket as ours, result.result(20).socket as theirs:
            assert _are_connected(ours, theirs)


def _are_connected(ours: socket.socket, theirs: socket.socket) -> bool:
    ours.send(b"x")
    theirs.setblocking(True)
    return theirs.recv(1) == b"x"


def test_address_of_another_process_is_passed_over() -> None:
    """As where a bridge has the same address on every host."""
    with (
        closing(Listener(["127.0.0.1"])) as right,
        closing(Listener(["127.0.0.1"])) as wrong,
        ThreadPoolExecutor() as pool,
    ):
        other = pool.submit(wrong.accept, 0, "here", _limit(2))
        with pytest.raises(CoordinationError, match="closed by the other side"):
            connect(1, "there", {**right.way, "port": wrong.way["port"]}, 0.5, lambda: None)
        with pytest.raises(LoadError, match="enough"):
            other.result(10)


def _limit(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def look_around() -> None:
        if time.monotonic() > deadline:
            raise LoadError("enough")

    return look_around


def test_rank_that_cannot_be_reached_is_named() -> None:
    with closing(Listener(["127.0.0.1"])) as listener:
        way = listener.way
    with pytest.raises(CoordinationError, match=r"rank 7 on there at port .*127\.0\.0\.1: Connection refused"):
        connect(7, "there", way, 0.5, lambda: None)


def test_waiting_for_the_upstream_rank_ends_with_what_is_heard() -> None:
    heard = threading.Event()

    def look_around() -> None:
        if heard.is_set():
            raise LoadError("another's")
        heard.set()

    with closing(Listener(["127.0.0.1"])) as listener, pytest.raises(LoadError, match="another's"):
        listener.accept(0, "here", look_around)
