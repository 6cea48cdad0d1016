"""An HTTP origin that a test can trust to count, and tell to misbehave.

    with Origin() as origin:
        url = origin.add("model.pth", content)                        # well-behaved
        url = origin.add("model.pth", content, truncate_at=1000)      # every reply is cut short
        url = origin.add("model.pth", content, Reply(status=503), Reply(truncate_at=9), Reply())
                                                                      # one reply a request; the last stays
        ...
        assert origin.request_count("model.pth") == 1

HTTP/1.1 with keep-alive, in threads of the test process, on a free loopback port. A held reply waits
for ``release``, and ``wait_until_sent`` waits for a byte count, so that tests act in the middle of a
download without a sleep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from harness.origin_handler import Handler
from harness.origin_records import Request, Resource
from harness.replies import Reply

__all__ = ["Origin", "Reply", "Request"]


class Origin:
    """The server. Enter it to start it; on leaving, every connection is cut and every thread joined."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._resources: dict[str, Resource] = {}
        self._requests: list[Request] = []
        self._released: set[str] = set()
        self._connections: set[socket.socket] = set()
        self.is_closing = False
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Origin:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self.is_closing = True
            self._changed.notify_all()
            for connection in self._connections:
                _cut(connection)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
        with self._changed:
            done = self._changed.wait_for(lambda: not self._connections, 10)
        assert done, f"{len(self._connections)} connections of the origin did not end"

    # What it serves

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, name: str) -> str:
        return f"{self.base_url}/{quote(name)}"

    def add(self, name: str, content: bytes | Path = b"", *replies: Reply, **behaviour: Any) -> str:
        """Serves ``content`` as ``/name``, in place of what stood there; returns the URL.

        Args:
            content: A file is mapped, not read.
            replies: One for each request in turn; the last answers all further ones.
            behaviour: The fields of the single ``Reply``, when there is only one.
        """
        assert not (replies and behaviour), "give Reply objects or their fields, not both"
        view = _map(content) if isinstance(content, Path) else memoryview(content)
        etag = f'"{hashlib.sha256(view).hexdigest()[:16]}"'
        with self._changed:
            self._resources["/" + name] = Resource(view, replies or (Reply(**behaviour),), etag, self._sent(name))
            self._released.discard(name)
        return self.url(name)

    def release(self, name: str) -> None:
        """Lets replies of ``name`` go on that ``hold_at`` or ``hold_before_reply`` stopped; later ones, too."""
        with self._changed:
            self._released.add(name)
            self._changed.notify_all()

    # What it saw

    def requests(self, name: str | None = None) -> list[Request]:
        """Requests so far, of one path or of all; GET and HEAD alike."""
        with self._changed:
            return [dataclasses.replace(seen) for seen in self._requests if name is None or seen.path == "/" + name]

    def request_count(self, name: str | None = None) -> int:
        return len(self.requests(name))

    def completed_count(self, name: str | None = None) -> int:
        """Replies whose whole body was sent."""
        return sum(request.is_complete for request in self.requests(name))

    def bytes_sent(self, name: str | None = None) -> int:
        """Body bytes over all replies."""
        return sum(request.body_bytes_sent for request in self.requests(name))

    def peak_concurrency(self, name: str) -> int:
        """The most requests for a path that ran at once; those answered with 429, too."""
        return max((request.concurrency for request in self.requests(name)), default=0)

    def wait_until_sent(self, name: str, count: int, timeout_seconds: float = 30) -> None:
        """Waits until ``count`` body bytes of ``name`` have been sent, over all requests."""
        self._wait_for(lambda: self._sent(name) >= count, timeout_seconds, f"{count} bytes of {name} sent")

    def wait_for_requests(self, name: str, count: int, timeout_seconds: float = 30) -> None:
        self._wait_for(
            lambda: sum(seen.path == "/" + name for seen in self._requests) >= count,
            timeout_seconds,
            f"{count} requests for {name}",
        )

    def wait_until_held(self, name: str, count: int = 1, timeout_seconds: float = 30) -> None:
        """Waits until ``count`` replies of ``name`` stand still, waiting for ``release``."""
        self._wait_for(
            lambda: sum(seen.path == "/" + name and seen.is_held for seen in self._requests) >= count,
            timeout_seconds,
            f"{count} held replies of {name}",
        )

    def wait_until_idle(self, timeout_seconds: float = 30) -> None:
        """Waits until every reply has ended: only then are the counts final."""
        self._wait_for(
            lambda: all(seen.ended_at is not None for seen in self._requests), timeout_seconds, "all replies ended"
        )

    # For the handler's threads

    def begin(
        self, method: str, path: str, query: str, headers: dict[str, str]
    ) -> tuple[Request, Resource | None, Reply]:
        """Notes a request, and chooses its reply."""
        with self._changed:
            running = sum(seen.path == path and seen.is_running for seen in self._requests)
            request = Request(method, path, query, headers, time.monotonic(), concurrency=running + 1)
            self._requests.append(request)
            resource = self._resources.get(path)
            reply = Reply(status=404)
            if resource is not None:
                reply = resource.next_reply(running, self._sent(path.removeprefix("/")))
            self._changed.notify_all()
        return request, resource, reply

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Makes what happens inside one step for all who look."""
        with self._changed:
            yield
            self._changed.notify_all()

    def update(self, request: Request, **fields: Any) -> None:
        with self.changing():
            for name, value in fields.items():
                setattr(request, name, value)

    def hold(self, request: Request) -> None:
        """Blocks the thread until the path is released or the origin closes."""
        name = request.path.removeprefix("/")
        with self._changed:
            request.is_held = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: name in self._released or self.is_closing)
            request.is_held = False
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Sleeps, but not longer than the origin lives."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closing, seconds)

    def connection_opened(self, connection: socket.socket) -> None:
        with self._changed:
            self._connections.add(connection)
            if self.is_closing:
                _cut(connection)

    def connection_closed(self, connection: socket.socket) -> None:
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    def _sent(self, name: str) -> int:
        return sum(seen.body_bytes_sent for seen in self._requests if seen.path == "/" + name)

    def _wait_for(self, predicate: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        with self._changed:
            seen = self._changed.wait_for(predicate, timeout_seconds)
        assert seen, f"not within {timeout_seconds:g} s: {what}; seen: {self._requests}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # Origin waits for its connections itself, with a deadline
    request_queue_size = 256

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        super().__init__(("127.0.0.1", 0), Handler)

    def server_bind(self) -> None:
        # HTTPServer's looks up the host's name, which may ask a DNS server.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.origin.connection_opened(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.origin.connection_closed(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle are what tests are about; anything else is a fault of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError) and not self.origin.is_closing:
            super().handle_error(request, client_address)


def _map(path: Path) -> memoryview:
    if path.stat().st_size == 0:
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by its own thread meanwhile
        connection.shutdown(socket.SHUT_RDWR)
