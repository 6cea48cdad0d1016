"""A TCP proxy in front of any server, which spoils connections: slow, cut, reset or silent.

    with nginx(root) as server, chaos(server.port, Fault(reset_at=1000), Fault()) as link:
        url = link.through(server.url("model.pth"))     # the first connection is reset after 1000 bytes

``Origin`` breaks replies; this breaks connections, below TLS and HTTP, of servers that we do not write. In threads of
the test process, on a free loopback port.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

_PIECE_BYTES = 64 * 1024
_TRICKLE_SECONDS = 0.02


@dataclass(frozen=True)
class Fault:
    """What one connection suffers on its way from the server to the client. The default is nothing.

    Attributes:
        latency_seconds: Before the first bytes that come after bytes in the other direction: a round trip.
        bytes_per_second: A limit; the server waits.
        cut_at: After so many bytes of all that the server sends, headers included, the connection closes orderly.
        reset_at: The same, with a TCP reset.
        stall_at: After so many bytes nothing comes any more, until ``Chaos.release`` or the client gives up.
    """

    latency_seconds: float = 0
    bytes_per_second: float | None = None
    cut_at: int | None = None
    reset_at: int | None = None
    stall_at: int | None = None

    def end_of_piece(self, begin: int) -> int:
        """How far to go on from ``begin`` before looking again."""
        size = _PIECE_BYTES
        if self.bytes_per_second is not None:
            size = min(size, max(1, int(self.bytes_per_second * _TRICKLE_SECONDS)))
        ends = [at for at in (self.cut_at, self.reset_at, self.stall_at) if at is not None and at > begin]
        return min([begin + size, *ends])


@dataclass(eq=False)
class Connection:
    """One connection of a client, as it stands now.

    Attributes:
        bytes_down: From the server to the client.
        bytes_up: From the client to the server.
    """

    fault: Fault
    client: socket.socket
    server: socket.socket
    bytes_down: int = 0
    bytes_up: int = 0
    is_asked: bool = False
    is_stalled: bool = False
    is_client_gone: bool = False
    is_open: bool = True

    def shut(self) -> None:
        """Ends both ways orderly, and wakes the threads that wait for one of its sockets."""
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):  # ended by its peer meanwhile
                side.shutdown(socket.SHUT_RDWR)

    def prepare_reset(self) -> None:
        """Has the next close of the client's socket send a reset, and drop what is unsent."""
        with contextlib.suppress(OSError):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.client.shutdown(socket.SHUT_RD)  # wakes its reader, and sends nothing: an orderly end would be first
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)


class Chaos:
    """The proxy; see ``chaos``."""

    def __init__(self, target: tuple[str, int], faults: tuple[Fault, ...]) -> None:
        self._target = target
        self._faults = faults
        self._changed = threading.Condition()
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._is_released = False
        self._is_closing = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def through(self, url: str) -> str:
        """The server's URL, changed so that it leads through this proxy."""
        parts = urlsplit(url)
        return urlunsplit(parts._replace(netloc=f"{parts.hostname}:{self.port}"))

    @property
    def connections(self) -> list[Connection]:
        """In the order in which they came; those that have ended, too."""
        with self._changed:
            return list(self._connections)

    def release(self) -> None:
        """Lets stalled connections go on; later ones do not stall."""
        with self._changed:
            self._is_released = True
            self._changed.notify_all()

    def wait_until_stalled(self, count: int = 1, timeout_seconds: float = 30) -> None:
        """Waits until ``count`` connections are silent."""
        self._wait_for(
            lambda: sum(connection.is_stalled for connection in self._connections) >= count,
            timeout_seconds,
            f"{count} stalled connections",
        )

    def wait_until_closed(self, timeout_seconds: float = 30) -> None:
        """Waits until every connection so far has ended: only then are its counts final."""
        self._wait_for(
            lambda: not any(connection.is_open for connection in self._connections), timeout_seconds, "all closed"
        )

    def close(self) -> None:
        """Ends every connection and every thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            for connection in self._connections:
                connection.shut()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread} of the proxy did not end"
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closing
            try:
                server = socket.create_connection(self._target, timeout=10)
                server.settimeout(None)
            except OSError:  # as if the client had talked to the server itself, once it is there
                client.close()
                continue
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                fault = self._faults[min(len(self._connections), len(self._faults) - 1)]
                connection = Connection(fault, client, server)
                self._connections.append(connection)
                if self._is_closing:
                    connection.shut()
            self._start(self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        """Passes bytes down until either side ends or the fault strikes; a thread of its own passes those up."""
        up = threading.Thread(target=self._pass_up, args=(connection,), daemon=True)
        up.start()
        is_reset = False
        with contextlib.suppress(OSError):
            is_reset = self._pass_down(connection)
        if is_reset:
            connection.prepare_reset()
        else:
            connection.shut()
        up.join()  # a socket that another thread still reads does not close
        with self._changed:
            connection.client.close()
            connection.server.close()
            connection.is_open = False
            self._changed.notify_all()

    def _pass_up(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            while piece := connection.client.recv(_PIECE_BYTES):
                self._update(connection, is_asked=True, bytes_up=connection.bytes_up + len(piece))
                connection.server.sendall(piece)
            connection.server.shutdown(socket.SHUT_WR)
        self._update(connection, is_client_gone=True)

    def _pass_down(self, connection: Connection) -> bool:
        """Returns whether a reset is what comes next."""
        fault = connection.fault
        while True:
            if connection.bytes_down == fault.stall_at and not self._stall(connection):
                return False
            if connection.bytes_down in (fault.cut_at, fault.reset_at):
                return connection.bytes_down == fault.reset_at
            piece = connection.server.recv(fault.end_of_piece(connection.bytes_down) - connection.bytes_down)
            if not piece:
                return False
            if connection.is_asked:
                self._update(connection, is_asked=False)
                self._pause(fault.latency_seconds)
            connection.client.sendall(piece)
            self._update(connection, bytes_down=connection.bytes_down + len(piece))
            if fault.bytes_per_second is not None:
                self._pause(len(piece) / fault.bytes_per_second)

    def _stall(self, connection: Connection) -> bool:
        """Returns whether it goes on after that."""
        self._update(connection, is_stalled=True)
        with self._changed:
            self._changed.wait_for(lambda: self._is_released or self._is_closing or connection.is_client_gone)
        self._update(connection, is_stalled=False)
        return self._is_released

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, seconds)

    def _update(self, connection: Connection, **fields: bool | int) -> None:
        with self._changed:
            for name, value in fields.items():
                setattr(connection, name, value)
            self._changed.notify_all()

    def _start(self, function: Callable[..., None], *args: Connection) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait_for(self, predicate: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        with self._changed:
            seen = self._changed.wait_for(predicate, timeout_seconds)
        assert seen, f"not within {timeout_seconds:g} s: {what}; seen: {self._connections}"


@contextlib.contextmanager
def chaos(port: int, *faults: Fault, host: str = "127.0.0.1") -> Iterator[Chaos]:
    """Stands before a server until the block ends.

    Args:
        port: The server's.
        faults: One for each connection in turn; the last for all further ones.
    """
    proxy = Chaos((host, port), faults or (Fault(),))
    try:
        yield proxy
    finally:
        proxy.close()
