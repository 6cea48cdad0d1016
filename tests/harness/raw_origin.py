r"""A server whose bytes the test writes itself: for answers that no HTTP server would give.

def endless(connection):
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

with RawOrigin(endless) as origin:
    ...
    origin.wait_until_idle()  # the client has closed every connection
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType

Reply = Callable[["Connection"], None]


class Connection:
    """One connection of a client.

    Attributes:
        sent_bytes: So far.
    """

    def __init__(self, accepted: socket.socket, closing: threading.Event) -> None:
        self._socket, self._closing = accepted, closing
        self.sent_bytes = 0

    def read_request(self) -> str:
        """The request line of the next request."""
        return self.read_head().partition("\r\n")[0]

    def read_head(self) -> str:
        """The next request: its line and its headers."""
        received = b""
        while b"\r\n\r\n" not in received:
            piece = self._socket.recv(65536)
            if not piece:
                raise ConnectionError("the client went away")
            received += piece
        return received.decode("latin-1")

    def sendall(self, content: bytes) -> None:
        """Raises an OSError when the client has gone away."""
        self._socket.sendall(content)
        self.sent_bytes += len(content)

    def trickle(self, content: bytes, seconds: float = 0.05) -> None:
        """Sends it again and again, with pauses, until the client goes away or the origin closes."""
        while not self._closing.wait(seconds):
            self.sendall(content)


class RawOrigin:
    """The server. Enter it to start it; on leaving, every connection is cut and every thread joined.

    Args:
        reply: Runs in a thread for each connection. When it returns, the connection closes.
    """

    def __init__(self, reply: Reply) -> None:
        self._reply, self._closing = reply, threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        self.connections: list[Connection] = []

    def __enter__(self) -> RawOrigin:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._changed:
            for accepted in self._open:
                with contextlib.suppress(OSError):
                    accepted.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a reply did not end"

    def url(self, name: str, scheme: str = "http") -> str:
        host, port = self._listening.getsockname()
        return f"{scheme}://{host}:{port}/{name}"

    @property
    def sent_bytes(self) -> int:
        return sum(connection.sent_bytes for connection in self.connections)

    def wait_for_connections(self, count: int, timeout_seconds: float = 30) -> None:
        """Waits until so many have come in all."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(self.connections) >= count, timeout_seconds)
        assert done, f"{len(self.connections)} connections, not {count}"

    def wait_until_idle(self, timeout_seconds: float = 10) -> None:
        """Waits until no connection is open: the client has closed them, if the reply never returns by itself."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._open, timeout_seconds)
        assert done, f"{len(self._open)} connections are still open"

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listening.accept()
            except OSError:
                return
            connection = Connection(accepted, self._closing)
            thread = threading.Thread(target=self._run, args=(accepted, connection), daemon=True)
            with self._changed:
                self._threads.append(thread)
                self._open.add(accepted)
                self.connections.append(connection)
                self._changed.notify_all()
            thread.start()

    def _run(self, accepted: socket.socket, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            self._reply(connection)
        with self._changed:
            self._open.discard(accepted)
            accepted.close()
            self._changed.notify_all()
