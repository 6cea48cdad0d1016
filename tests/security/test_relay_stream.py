"""What arrives through the relay: changed on the way by somebody between two nodes, or described falsely."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import mounts
from harness.nodes import become_node
from harness.origin import Origin
from harness.ranks import run_ranks
from rankload._coordination.channel import Channel
from rankload._load.broadcast.header import BadHeaderError, BroadcastHeader, check_names, read_header
from rankload._relay.blocks import BytesBlock
from rankload._relay.links import Link
from rankload._relay.relay import Relay
from rankload._relay.seal import PIECE_BYTES, TAG_BYTES
from rankload.errors import CoordinationError, LoadError

needs_nodes = pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))

# --- pieces and tags --------------------------------------------------------------------------------------------------

_FRAME_BYTES = PIECE_BYTES + TAG_BYTES
_FRAMES = 3

Change = Callable[[bytearray], bytes]


def _flip(at: int) -> Change:
    def change(stream: bytearray) -> bytes:
        stream[at] ^= 1
        return bytes(stream)

    return change


def _in_order(*numbers: int) -> Change:
    return lambda stream: b"".join(
        bytes(stream[number * _FRAME_BYTES : (number + 1) * _FRAME_BYTES]) for number in numbers
    )


_CHANGES: dict[str, Change] = {
    "first bit": _flip(0),
    "a bit of the last piece": _flip(2 * _FRAME_BYTES + 5),
    "a bit of a tag": _flip(_FRAME_BYTES - 1),
    "pieces swapped": _in_order(1, 0, 2),
    "a piece repeated": _in_order(0, 0, 2),
    "a piece dropped": _in_order(0, 2, 2),
}


def _pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair()
    for end in ends:
        stack.enter_context(end)
    return ends


def _ready(end: socket.socket, rank: int) -> Link:
    end.setblocking(False)
    return Link(rank, f"host-{rank}", end)


def _through(
    stack: ExitStack, pool: ThreadPoolExecutor, change: Change, key: bytes = bytes(32)
) -> list[Future[tuple[str, bytes]]]:
    """Send a block through an attacker to rank 1, and from there to rank 2; return what they receive."""
    to_attacker, of_attacker = _pair(stack)
    from_attacker, of_rank_1 = _pair(stack)
    to_rank_2, of_rank_2 = _pair(stack)
    failed = threading.Event()

    def watch(_: object) -> None:
        if failed.is_set():
            raise LoadError("rank 1 has failed")

    source = Relay(None, [_ready(to_attacker, 1)], watch, 60, bytes(32))
    rank_1 = Relay(_ready(of_rank_1, 0), [_ready(to_rank_2, 2)], watch, 60, key)
    rank_2 = Relay(_ready(of_rank_2, 1), [], watch, 60, bytes(32))

    def receive(relay: Relay) -> tuple[str, bytes]:
        memory = bytearray(_FRAMES * PIECE_BYTES)
        try:
            return relay.receive(memoryview(memory)), bytes(memory)
        finally:
            failed.set() if relay is rank_1 else None

    def attack() -> None:
        stream = bytearray()
        while len(stream) < _FRAMES * _FRAME_BYTES:
            stream += of_attacker.recv(1 << 20)
        with suppress(OSError):
            from_attacker.sendall(change(stream))

    of_attacker.settimeout(30)
    from_attacker.settimeout(30)
    attacker = pool.submit(attack)
    results = [pool.submit(receive, relay) for relay in (rank_1, rank_2)]
    source.send(BytesBlock(memoryview(_content())))
    for result in results:
        result.exception(30)
    of_rank_1.close()  # the attacker may still want to send the rest
    attacker.result(30)
    return results


def _content() -> bytes:
    return random.Random(2).randbytes(_FRAMES * PIECE_BYTES)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_unchanged_stream_arrives(stack: ExitStack) -> None:
    with ThreadPoolExecutor() as pool:
        results = [result.result() for result in _through(stack, pool, bytes)]
    assert [content for _, content in results] == [_content()] * 2
    assert len({digest for digest, _ in results}) == 1


@pytest.mark.fault(67)
@pytest.mark.parametrize("how", _CHANGES)
def test_changed_stream_is_no_ranks(stack: ExitStack, how: str) -> None:
    with ThreadPoolExecutor() as pool:
        first, second = _through(stack, pool, _CHANGES[how])
    with pytest.raises(CoordinationError, match="rank 0 on host-0 differ from those that the source sent"):
        first.result()
    with pytest.raises(LoadError, match="rank 1 has failed"):  # it has no tag to blame its neighbour by
        second.result()


def test_stream_under_another_key_is_no_ranks(stack: ExitStack) -> None:
    """As one that was recorded in an earlier call."""
    with ThreadPoolExecutor() as pool:
        first, _ = _through(stack, pool, bytes, key=bytes(31) + b"\1")
    with pytest.raises(CoordinationError, match="differ from those that the source sent"):
        first.result()


# --- between real ranks -----------------------------------------------------------------------------------------------


def _change_what_comes(at: int) -> None:
    """Put a proxy in front of this rank's listener that changes one bit of what upstream sends."""
    from rankload._relay.listener import Listener

    way = Listener.way
    proxies: list[int] = []

    def way_through_proxy(listener: Listener) -> dict[str, Any]:
        true_way: dict[str, Any] = way.fget(listener)  # type: ignore[attr-defined]
        if not proxies:
            proxies.append(_start_proxy(true_way["port"], at))
        return {**true_way, "addresses": ["127.0.0.1"], "port": proxies[0]}

    Listener.way = property(way_through_proxy)  # type: ignore[assignment]


def _start_proxy(port: int, at: int) -> int:
    server = socket.create_server(("127.0.0.1", 0))

    def pass_on(begin: socket.socket, end: socket.socket, at: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while piece := bytearray(begin.recv(1 << 16)):
                if at is not None and passed <= at < passed + len(piece):
                    piece[at - passed] ^= 1
                passed += len(piece)
                end.sendall(piece)
        with suppress(OSError):
            end.shutdown(socket.SHUT_WR)

    def serve() -> None:
        upstream, _ = server.accept()
        downstream = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=pass_on, args=[downstream, upstream, None], daemon=True).start()
        pass_on(upstream, downstream, at)

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


_MEGABYTES = 5


def _load_through_attacker(
    rank: int, url: str, directory: Path, attacked: int, at: int, is_module: bool
) -> tuple[str, str, int | None]:
    from rankload import RankloadError, dist_load_into, dist_load_state_dict_from_url

    become_node(rank, directory)
    if rank == attacked:
        _change_what_comes(at)
    with pytest.raises(RankloadError) as caught:
        if is_module:
            dist_load_into(
                nn.Linear(1 << 10, _MEGABYTES << 8, bias=False), url, directory / f"{rank}", delivery="broadcast"
            )
        else:
            dist_load_state_dict_from_url(url, directory / f"{rank}", delivery="broadcast")
    return type(caught.value).__name__, str(caught.value), caught.value.rank


@pytest.mark.fault(67)
@needs_nodes
@pytest.mark.parametrize("attacked", [1, 2])
@pytest.mark.parametrize(("is_module", "at"), [(False, 1000), (False, 5_000_000), (True, 130), (True, 4_000_000)])
def test_no_rank_loads_what_was_changed_between_two(
    origin: Origin, tmp_path: Path, attacked: int, is_module: bool, at: int
) -> None:
    torch.save({"weight": torch.ones(_MEGABYTES << 8, 1 << 10)}, tmp_path / "ones.pth")
    url = origin.add("ones.pth", tmp_path / "ones.pth")
    results = run_ranks(_load_through_attacker, 3, args=(url, tmp_path, attacked, at, is_module))
    for result in results:
        name, text, rank = result.value
        assert name == "CoordinationError" and rank == attacked, text
        assert f"the bytes from rank {attacked - 1} on" in text and f"[rank {attacked} on" in text


def _load_twice(rank: int, url: str, directory: Path) -> tuple[str, str]:
    from rankload import RankloadError, dist_load_state_dict_from_url

    become_node(rank, directory)
    dist_load_state_dict_from_url(url, directory / f"{rank}", delivery="broadcast")
    if rank == 0:
        _damage(directory / "0" / "ones.pth")
    with pytest.raises(RankloadError) as caught:
        dist_load_state_dict_from_url(url, directory / f"{rank}", delivery="broadcast")
    return type(caught.value).__name__, str(caught.value)


def _damage(path: Path) -> None:
    """Change a byte as a failing disk does: nothing that stat knows."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        file.write(b"\x55")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@needs_nodes
def test_file_that_is_not_the_verified_one_any_more(origin: Origin, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(300, 1000)}, tmp_path / "ones.pth")
    for result in run_ranks(_load_twice, 3, args=(origin.add("ones.pth", tmp_path / "ones.pth"), tmp_path)):
        name, text = result.value
        assert name == "DigestMismatchError" and "ones.pth" in text, text


# --- descriptions that lie --------------------------------------------------------------------------------------------

_ANNOUNCED = {"index.json": 100, "part/a.bin": 5000}
_TRUE: dict[str, Any] = {
    "name": "index.json",
    "display_name": "/there/index.json",
    "sizes": dict(_ANNOUNCED),
    "is_whole": False,
    "kept": {"index.json": [[0, 100]], "part/a.bin": [[0, 10], [4990, 5000]]},
    "ranges": {"part/a.bin": [[10, 4000]]},
}


def test_true_description_is_read() -> None:
    header = read_header(json.dumps(_TRUE).encode(), _ANNOUNCED)
    assert header.kept["part/a.bin"] == [(0, 10), (4990, 5000)] and header.sizes == _ANNOUNCED
    assert read_header(header.as_json(), _ANNOUNCED) == header


@pytest.mark.parametrize(
    "lie",
    [
        {"name": "other"},
        {"name": ["index.json"]},
        {"display_name": 1},
        {"sizes": []},
        {"sizes": {"index.json": -1}},
        {"sizes": {"index.json": True}},
        {"sizes": {"index.json": 1e9}},
        {"sizes": {"index.json": "100"}},
        {"sizes": {"index.json": 1 << 62}},
        {"sizes": {**_ANNOUNCED, "unannounced": 1}},
        {"sizes": {**_ANNOUNCED, "index.json": 101}, "is_whole": True},
        {"sizes": {"index.json": 100}, "is_whole": True, "kept": {}, "ranges": {}},
        {"is_whole": 1},
        {"kept": []},
        {"kept": {"unannounced": []}},
        {"kept": {"index.json": [[0, 101]]}},
        {"kept": {"index.json": [[-1, 10]]}},
        {"kept": {"index.json": [[10, 10]]}},
        {"kept": {"index.json": [[10, 5]]}},
        {"kept": {"index.json": [[0, 10, 20]]}},
        {"kept": {"index.json": [[0, 10.5]]}},
        {"kept": {"index.json": [0, 10]}},
        {"kept": {"index.json": {"0": 10}}},
        {"ranges": {"part/a.bin": [[0, 100], [50, 200]]}},
        {"ranges": {"part/a.bin": [[100, 200], [0, 50]]}},
        {"ranges": {"part/a.bin": [[0, 1 << 70]]}},
        {"more": 1},
    ],
    ids=str,
)
def test_description_that_lies_is_refused(lie: dict[str, Any]) -> None:
    with pytest.raises(BadHeaderError):
        read_header(json.dumps({**_TRUE, **lie}).encode(), _ANNOUNCED)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b"1" * 10_000])
def test_description_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(BadHeaderError):
        read_header(text, _ANNOUNCED)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../a", "a/../../b", "/etc/passwd", "a\0b", "./a", "a//b", "a/", "a\\b"),
        "\ud800",
        "n" * 256,
        f"{'d/' * 600}a",
    ],
)
def test_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(BadHeaderError, match="name"):
        check_names({name: 1})


def test_file_below_another_is_refused() -> None:
    with pytest.raises(BadHeaderError, match="below another"):
        check_names({"a": 1, "a/b": 1})
    check_names({"a-b": 1, "a/b": 1, "a.bin": 1, "gewichte-ü.pth": 1})


def _load_what_is_described_falsely(rank: int, path: Path, directory: Path, lie: dict[str, Any]) -> tuple[str, str]:
    from rankload import RankloadError, dist_load_into
    from rankload._load.broadcast import headers_first
    from rankload._load.delivery import broadcast_sender

    become_node(rank, directory)
    if rank == 0:

        def as_json(self: BroadcastHeader) -> bytes:
            return json.dumps({**vars(self), **lie}).encode()

        def send_false_length(relay: Relay, channel: Channel, text: bytes) -> None:
            channel.post(headers_first._COMING_KEY, {})
            relay.send(BytesBlock(memoryview((1 << 60).to_bytes(headers_first._LENGTH_BYTES, "little"))))

        if lie:
            BroadcastHeader.as_json = as_json  # type: ignore[method-assign]
        else:
            broadcast_sender.send_header = send_false_length
    with pytest.raises(RankloadError) as caught:
        dist_load_into(nn.Linear(100, 1000), path, delivery="broadcast")
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.fault(67)
@needs_nodes
@pytest.mark.parametrize(
    "lie",
    [
        {"name": "../linear.pth"},
        {"sizes": {"linear.pth": 1 << 62}},
        {"ranges": {"linear.pth": [[0, 1 << 62]]}},
        {},  # a length that no memory has
    ],
)
def test_source_that_lies_is_an_error_on_all_ranks(tmp_path: Path, lie: dict[str, Any]) -> None:
    torch.save(nn.Linear(100, 1000).state_dict(), tmp_path / "linear.pth")
    for result in run_ranks(_load_what_is_described_falsely, 3, args=(tmp_path / "linear.pth", tmp_path, lie)):
        name, text = result.value
        assert name == "LoadError" and "rank 0 sent an invalid broadcast header" in text, text
