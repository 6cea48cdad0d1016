"""Nodes that fetch a file together, each in a thread of this process, with its own partial file."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness.origin import Origin
from rankload._cache.layout import Entry
from rankload._fetch.exchange.frames import END, HEAD_BYTES, head_of, tag_of
from rankload._fetch.exchange.plan import make_plan
from rankload._fetch.exchange.receive import receive_in_ring
from rankload._fetch.exchange.ring import Ring, Served
from rankload._fetch.exchange.wire import StoppedError, Wire
from rankload._fetch.mirrors import Received
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.origin import Version
from rankload._fetch.partials.partial import Partial
from rankload._relay.links import Link
from rankload._settings import Settings
from rankload._types import Progress
from rankload._urls import Url
from rankload.errors import (
    CacheError,
    ContentChangedError,
    CoordinationError,
    FetchError,
    LoadError,
    ProgressTimeoutError,
    RankLostError,
)

UNIT = 64 << 10
CONTENT = os.urandom(UNIT * 11 + 1234)
ALL = frozenset(range(12))
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SETTINGS = replace(Settings(), chunk_bytes=UNIT, progress_seconds=20.0, retries=1, backoff_seconds=0.01)


@dataclass(frozen=True)
class Node:
    """A node, the units that it has, and whether it reaches the origin."""

    rank: int
    held: frozenset[int] = frozenset()
    may_fetch: bool = True


class Cluster:
    """Nodes in a ring of socket pairs.

    Args:
        url: of the file.
        directory: for the nodes' caches.
        nodes: the nodes.
        version: of the file, as the origin describes it.
    """

    def __init__(self, url: str, directory: Path, nodes: list[Node], version: Version) -> None:
        self.url, self.nodes, self.version = Url.parse(url), nodes, version
        held = frozenset[int]().union(*(node.held for node in nodes))
        fetchers = [node.rank for node in nodes if node.may_fetch]
        missing = sorted(ALL - held)
        plan = make_plan(len(CONTENT), UNIT, UNIT, [node.rank for node in nodes], fetchers, missing)
        assert plan is not None
        self.plan, self._stack = plan, ExitStack()
        self.pairs = [socket.socketpair() for _ in nodes]  # of each node to the next
        for pair in self.pairs:
            for end in pair:
                end.setblocking(False)
                self._stack.enter_context(end)
        self.entries = [Entry(directory / str(index) / "file.bin") for index in range(len(nodes))]
        for entry in self.entries:
            entry.path.parent.mkdir()
        self.report: Callable[[int, Progress], None] = lambda node, progress: None
        self.rest = (0, b"")  # of an earlier download of node 1: an offset, and bytes

    def ring(self, index: int, key: bytes = bytes(32), *, may_catch_up: bool = False) -> Ring:
        before, after = (index - 1) % len(self.nodes), self.plan.next(index)
        upstream = Link(self.nodes[before].rank, "before", self.pairs[before][1])
        downstream = Link(self.nodes[after].rank, "after", self.pairs[index][0])
        return Ring(
            self.plan, index, self.version, self.nodes[index].held, self.nodes[after].held, (upstream, downstream), key,
            may_catch_up=may_catch_up,
        )  # fmt: skip

    def fetch(self, index: int, ring: Ring | None = None) -> tuple[Received, bytes]:
        request = FetchRequest((self.url,), self.entries[index].path.parent, "file.bin", progress=False)
        with Partial(self.entries[index], SETTINGS) as partial:
            for unit in self.nodes[index].held:
                begin, end = self.plan.span(unit)
                os.pwrite(partial.descriptor, CONTENT[begin:end], begin)
                partial.spans.add(begin, end)
            if index == 1 and self.rest[1]:
                begin, content = self.rest
                os.pwrite(partial.descriptor, content, begin)
                partial.spans.add(begin, begin + len(content))
            received = receive_in_ring(
                ring or self.ring(index),
                self.url,
                request,
                partial,
                lambda progress: self.report(index, progress),
                SETTINGS,
            )
            return received, partial.path.read_bytes()[: received.size_bytes]

    def fetch_all(self, keys: Mapping[int, bytes] | None = None) -> list[tuple[Received, bytes] | Exception]:
        """Let all nodes fetch, and return what each got; a node that fails closes its connections.

        Args:
            keys: keys of nodes that do not have the common one.
        """

        def outcome(node: int) -> tuple[Received, bytes] | Exception:
            try:
                return self.fetch(node, self.ring(node, (keys or {}).get(node, bytes(32))))
            except Exception as error:
                for end in (self.pairs[node][0], self.pairs[(node - 1) % len(self.nodes)][1]):
                    end.shutdown(socket.SHUT_RDWR)
                return error

        with ThreadPoolExecutor(len(self.nodes)) as pool:
            return list(pool.map(outcome, range(len(self.nodes))))

    def cut(self) -> None:
        """Break all connections."""
        for pair in self.pairs:
            for end in pair:
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def clusters(origin: Origin, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(*nodes: Node, **faults: object) -> Cluster:
        url = origin.add("file.bin", CONTENT, etag='"1"', **faults)
        made.append(Cluster(url, tmp_path, list(nodes), Version(len(CONTENT), '"1"')))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.mark.parametrize(
    ("nodes", "fetched_bytes"),
    [
        ([Node(0), Node(1)], len(CONTENT)),
        ([Node(0), Node(3), Node(4), Node(9)], len(CONTENT)),
        ([Node(0), Node(1, may_fetch=False), Node(2, may_fetch=False)], len(CONTENT)),
        (
            [Node(0), Node(1, frozenset({0, 1, 2})), Node(2, frozenset({1, 7}))],
            len(CONTENT) - 4 * UNIT,
        ),
        ([Node(0, may_fetch=False), Node(1, ALL), Node(2, may_fetch=False)], 0),
        ([Node(0), Node(1, ALL - {5}), Node(2, frozenset({5}))], 0),
    ],
)
def test_all_nodes_have_the_file_and_the_origin_has_served_it_once(
    origin: Origin, clusters: Callable[..., Cluster], nodes: list[Node], fetched_bytes: int
) -> None:
    cluster = clusters(*nodes)
    for outcome in cluster.fetch_all():
        assert not isinstance(outcome, Exception), outcome
        received, content = outcome
        assert content == CONTENT and received.sha256 == DIGEST and received.size_bytes == len(CONTENT)
    assert origin.bytes_sent() == fetched_bytes


def test_ring_carries_what_each_node_lacks_and_no_more(clusters: Callable[..., Cluster]) -> None:
    cluster = clusters(Node(0), Node(1), Node(2), Node(3))
    rings = [cluster.ring(node) for node in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda node: cluster.fetch(node, rings[node]), range(4)))
    for node, ring in enumerate(rings):
        own = sum(end - begin for begin, end in map(cluster.plan.span, cluster.plan.fetched_by(node)))
        assert ring.received_bytes == len(CONTENT) - own and not ring.extra_bytes


def test_node_whose_neighbours_are_slow_fetches_more_and_sends_it_on(
    origin: Origin, clusters: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 1 reaches the origin, but slowly; node 0 fetches most of node 1's part, and node 1 gets it from node 0."""
    monkeypatch.setattr("rankload._fetch.exchange.catch_up._WINDOW_SECONDS", 0.1)
    cluster = clusters(Node(0), Node(1))
    held = threading.Event()
    ring, slow = cluster.ring(0, may_catch_up=True), cluster.ring(1)

    def report(node: int, progress: Progress) -> None:
        if node == 1 and not held.wait(20):  # the thread that starts the streams
            raise LoadError("node 0 does not fetch more")
        if ring.extra_bytes:
            held.set()

    cluster.report = report
    with ThreadPoolExecutor(2) as pool:
        received = [
            future.result() for future in [pool.submit(cluster.fetch, 0, ring), pool.submit(cluster.fetch, 1, slow)]
        ]
    assert [content for _, content in received] == [CONTENT] * 2
    assert ring.extra_bytes > 0 and len(CONTENT) <= origin.bytes_sent() <= len(CONTENT) + ring.extra_bytes


def test_origin_that_fails_fails_on_all_nodes(origin: Origin, clusters: Callable[..., Cluster]) -> None:
    cluster = clusters(Node(0), Node(1), Node(2), status=404)
    outcomes = cluster.fetch_all()
    assert any(isinstance(outcome, FetchError) for outcome in outcomes)
    assert all(isinstance(outcome, (FetchError, RankLostError)) for outcome in outcomes)


def test_unit_that_the_origin_sends_is_not_overwritten_by_another_node(clusters: Callable[..., Cluster]) -> None:
    """What was hashed must be what is on the disk. This test is node 1, and sends a wrong unit of node 0's part."""
    cluster = clusters(Node(0), Node(1), bytes_per_second=200_000)
    wrong, own = cluster.plan.fetched_by(0)[-1], cluster.plan.fetched_by(1)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(cluster.fetch, 0)
        for unit in (wrong, *own):
            begin, end = cluster.plan.span(unit)
            content = bytes(end - begin) if unit == wrong else CONTENT[begin:end]
            send_all(cluster.pairs[1][0], unit, content)
        send_all(cluster.pairs[1][0], END, b"")
        while not other.done():
            with suppress(BlockingIOError):
                cluster.pairs[0][1].recv(UNIT)
    received, content = other.result()
    assert content == CONTENT and received.sha256 == DIGEST


def send_all(connection: socket.socket, unit: int, content: bytes) -> None:
    head = head_of(unit, len(content))
    connection.setblocking(True)
    connection.sendall(head + content + tag_of(bytes(32), head, content))


def test_rest_of_an_earlier_download_is_no_part_of_what_the_ring_brings(clusters: Callable[..., Cluster]) -> None:
    """Node 1 has wrong bytes at the front of a unit that node 0 fetches: they would be hashed before that arrives."""
    cluster = clusters(Node(0), Node(1), bytes_per_second=200_000)
    begin, end = cluster.plan.span(cluster.plan.fetched_by(0)[0])
    cluster.rest = (begin, bytes((end - begin) // 2))
    for outcome in cluster.fetch_all():
        assert not isinstance(outcome, Exception), outcome
        received, content = outcome
        assert content == CONTENT and received.sha256 == DIGEST


def test_node_that_dies_ends_the_others(clusters: Callable[..., Cluster]) -> None:
    cluster = clusters(Node(0), Node(1), Node(2))

    def report(node: int, progress: Progress) -> None:
        if node == 1:  # before it has fetched its part, so that nobody can be through
            raise LoadError("this node dies")

    cluster.report = report
    first, second, third = cluster.fetch_all()
    assert isinstance(second, LoadError)
    assert isinstance(first, RankLostError) and isinstance(third, RankLostError)
    assert not [path for entry in cluster.entries for path in entry.path.parent.iterdir() if path == entry.path]


def test_file_that_changes_meanwhile(origin: Origin, clusters: Callable[..., Cluster]) -> None:
    cluster = clusters(Node(0), Node(1))
    origin.add("file.bin", CONTENT, etag='"2"')
    outcomes = cluster.fetch_all()
    assert any(isinstance(outcome, ContentChangedError) for outcome in outcomes), outcomes


class Flipping:
    """A socket that changes a byte of the payload on its way."""

    def __init__(self, inner: socket.socket, at: int) -> None:
        self._inner, self._at, self._seen = inner, at, 0

    def fileno(self) -> int:
        return self._inner.fileno()

    def send(self, content: memoryview) -> int:
        return self._inner.send(content)

    def recv_into(self, view: memoryview) -> int:
        count = self._inner.recv_into(view)
        if self._seen <= self._at < self._seen + count:
            view[self._at - self._seen] ^= 1
        self._seen += count
        return count


@pytest.mark.fault(93)
@pytest.mark.parametrize("at", [HEAD_BYTES, HEAD_BYTES + UNIT - 1, HEAD_BYTES + UNIT + 3, 3])
def test_byte_that_changes_on_the_wire_is_noticed_on_arrival(clusters: Callable[..., Cluster], at: int) -> None:
    cluster = clusters(Node(0), Node(1))
    ring = cluster.ring(1)
    wire = ring._upstream
    wire.link = replace(wire.link, socket=Flipping(wire.link.socket, at))
    errors: list[Exception] = []

    def other() -> None:
        try:
            cluster.fetch(0)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(CoordinationError, match=r"differ from those that it sent|which nobody expects"):
        cluster.fetch(1, ring)
    cluster.cut()
    thread.join()
    assert isinstance(errors[0], RankLostError)


@pytest.mark.fault(93)
def test_another_key_is_refused(clusters: Callable[..., Cluster]) -> None:
    errors = clusters(Node(0), Node(1)).fetch_all({1: b"x" * 32})
    assert any(isinstance(error, CoordinationError) for error in errors)


def test_node_before_that_sends_nothing_is_named(
    clusters: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = clusters(Node(0), Node(7))
    monkeypatch.setattr("test_exchange_ring.SETTINGS", replace(SETTINGS, progress_seconds=1.0))
    with pytest.raises(ProgressTimeoutError, match="from rank 0 on before for 1 s"):
        cluster.fetch(1)


def test_disk_that_cannot_be_written_is_told_as_such(
    clusters: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = clusters(Node(0), Node(1))
    ring = cluster.ring(1)
    monkeypatch.setattr(ring._upstream, "receive", lambda length: (_ for _ in ()).throw(CacheError("no room")))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(cluster.fetch, 0)
        with pytest.raises(CacheError, match="no room"):
            cluster.fetch(1, ring)
        cluster.cut()
        assert isinstance(other.exception(), RankLostError)


def test_thread_of_the_ring_ends_although_its_neighbour_is_never_slow() -> None:
    own, other = socket.socketpair()
    with own, other:
        own.setblocking(False)
        is_stopped = threading.Event()
        wire = Wire(Link(1, "before", own), is_stopped)
        wire.send(b"unit")
        assert other.recv(4) == b"unit"
        is_stopped.set()
        with pytest.raises(StoppedError):
            wire.send(b"unit")
        other.sendall(b"unit")
        with pytest.raises(StoppedError):
            wire.receive(4)


def test_descriptor_that_is_lent_outlasts_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with (tmp_path / "file").open("rb") as file:
        lending = Served(file.fileno()).lent()
        descriptor = lending.__enter__()
    assert os.pread(descriptor, 4, 0) == CONTENT[:4]
    lending.__exit__(None, None, None)
