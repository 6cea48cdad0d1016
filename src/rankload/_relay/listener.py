"""Listen for the upstream rank on a network where strangers can connect, too.

A stranger learns nothing: the listener reads a whole hello before it compares the hello, and closes the connection
after any wrong hello, without an answer. A stranger occupies little: few connections may be pending, and a connection
that has not shown the key makes room for the next.
"""

from __future__ import annotations

import errno
import secrets
import selectors
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from enum import Enum, auto
from typing import Any, cast

from rankload._relay.handshake import CONFIRMATION_BYTES, HELLO_BYTES, KEY_BYTES, DownstreamHandshake
from rankload._relay.links import LOOK_SECONDS, Link, LookAround, prepared
from rankload._settings import PORTS_VARIABLE, ports_to_try
from rankload.errors import CoordinationError

#: Time limit for a connection to prove that it comes from upstream.
_CANDIDATE_SECONDS = 30.0

#: Most pending connections. The upstream rank has one, and rarely a few that it gave up.
_MAX_CANDIDATES = 8

#: Limit on complete hellos with our magic number and a wrong MAC: the sender guesses, or replays a recording. A 256-bit
#: key cannot be guessed, so the limit is an alarm.
_MAX_WRONG = 5

#: Limit on first messages without our magic number. Port scanners and monitoring probes send some, and do no harm.
_MAX_RUBBISH = 100

#: How often to choose another port if one is taken on some of the addresses.
_PORT_ATTEMPTS = 10

#: Connections that the kernel completes before they are accepted.
_BACKLOG = 128

#: Pause before the next accept() when the process or the machine has run out of descriptors or memory.
_PAUSE_SECONDS = 0.1


class Listener:
    """Listening sockets for the upstream rank, on the given addresses only.

    The listener's key reaches the upstream rank through the job's store.

    Args:
        addresses: numeric addresses of this host. Addresses that cannot be bound are not announced.

    Raises (the constructor):
        CoordinationError: no address can be bound.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._key = secrets.token_bytes(KEY_BYTES)
        self._sockets = _listen(addresses)
        self._port: int = next(iter(self._sockets.values())).getsockname()[1]

    @property
    def way(self) -> dict[str, Any]:
        """Facts that the upstream rank needs to connect: addresses, port, and key in hex."""
        return {"addresses": list(self._sockets), "port": self._port, "key": self._key.hex()}

    def accept(self, rank: int, host: str, look_around: LookAround) -> Link:
        """Wait for the upstream rank, and return its connection.

        An error of ``look_around`` ends the wait: another rank's failure, or an upstream rank that is lost or stuck.

        Raises:
            CoordinationError: another process keeps connecting.
        """
        with closing(_Newcomers(self._key, self._port)) as candidates:
            while True:
                look_around()
                connection = candidates.look(self._sockets.values())
                if connection is not None:
                    return Link(rank, host, prepared(connection))

    def close(self) -> None:
        """Stop listening."""
        for listening in self._sockets.values():
            listening.close()


class _Newcomers:
    """Pending connections, one of which may be upstream's. No connection keeps another waiting.

    Args:
        key: the listener's key.
        port: the listener's port, for messages.
    """

    def __init__(self, key: bytes, port: int) -> None:
        self._key, self._port = key, port
        self._pending: dict[socket.socket, _Newcomer] = {}  # the oldest first
        self._hellos_seen: set[bytes] = set()
        self._wrong = self._rubbish = 0

    def look(self, listening: Collection[socket.socket]) -> socket.socket | None:
        """Wait a moment for new connections and messages. Return upstream's connection once it has proved itself."""
        with selectors.PollSelector() as selector:  # poll(2) needs no descriptor: the process may have none left
            for waiting in (*self._pending, *listening):
                selector.register(waiting, selectors.EVENT_READ)
            ready = {cast("socket.socket", key.fileobj) for key, _ in selector.select(LOOK_SECONDS)}
        # read from pending connections first: a newcomer may push one of them out
        for connection in [pending for pending in self._pending if pending in ready]:
            if self._hear(connection):
                del self._pending[connection]
                return connection
        for connection in [pending for pending, candidate in self._pending.items() if candidate.is_late]:
            self._drop(connection)
        for server in listening:
            if server in ready:
                self._accept(server)
        return None

    def close(self) -> None:
        """Close all pending connections."""
        for connection in [*self._pending]:
            self._drop(connection)

    def _hear(self, connection: socket.socket) -> bool:
        state = self._pending[connection].read(self._key, self._hellos_seen)
        if state in (_State.GONE, _State.WRONG, _State.RUBBISH):
            self._drop(connection)
        self._wrong += state is _State.WRONG
        self._rubbish += state is _State.RUBBISH
        if self._wrong >= _MAX_WRONG or self._rubbish >= _MAX_RUBBISH:
            what = "with a wrong proof of identity" if self._wrong >= _MAX_WRONG else "with another protocol"
            raise CoordinationError(
                f"something other than the upstream rank keeps connecting to the relay's port {self._port} of this "
                f"host, {what} ({self._wrong + self._rubbish} times): a port scanner, another job, or an attacker; "
                "block its access to the nodes' ports, choose another network by GLOO_SOCKET_IFNAME, or let nodes send "
                "one another nothing: scope='node', delivery='read'",
                port=self._port,
            )
        return state is _State.PROVED

    def _accept(self, server: socket.socket) -> None:
        if len(self._pending) >= _MAX_CANDIDATES:
            self._drop_oldest()
        try:
            connection, _ = server.accept()
        except OSError as error:  # the client is gone; or out of descriptors or memory: free what strangers hold
            if isinstance(error, (BlockingIOError, ConnectionError)):
                return
            if self._pending:
                self._drop_oldest()
            else:
                time.sleep(_PAUSE_SECONDS)  # or the loop would spin: the connection stays ready to be accepted
            return
        connection.setblocking(False)
        self._pending[connection] = _Newcomer(connection)

    def _drop_oldest(self) -> None:
        """Drop the oldest connection, preferably one that has not shown the key."""
        self._drop(min(self._pending, key=lambda connection: self._pending[connection].has_said_hello))

    def _drop(self, connection: socket.socket) -> None:
        del self._pending[connection]
        connection.close()


class _State(Enum):
    """The state of a pending connection."""

    PENDING = auto()
    PROVED = auto()
    GONE = auto()
    WRONG = auto()
    RUBBISH = auto()


class _Newcomer:
    """A pending connection that may come from the upstream rank."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + _CANDIDATE_SECONDS
        self._said = b""
        self._handshake: DownstreamHandshake | None = None

    @property
    def has_said_hello(self) -> bool:
        """Whether the peer has sent a right hello. Only the confirmation proves that the hello was no replay."""
        return self._handshake is not None

    @property
    def is_late(self) -> bool:
        """Whether the peer has exceeded its time limit."""
        return time.monotonic() > self._deadline

    def read(self, key: bytes, hellos_seen: set[bytes]) -> _State:
        """Read from the connection, and check a message once it is complete.

        Args:
            key: the listener's key.
            hellos_seen: nonces of the right hellos so far; a repeated nonce is a replay.
        """
        expected = CONFIRMATION_BYTES if self._handshake else HELLO_BYTES
        try:
            # not a byte beyond the message: the bytes after the confirmation belong to the relay
            more = self._connection.recv(expected - len(self._said))
        except BlockingIOError:
            return _State.PENDING
        except OSError:
            return _State.GONE
        self._said += more
        if not more:
            return _State.GONE
        if len(self._said) < expected:
            return _State.PENDING
        message, self._said = self._said, b""
        if self._handshake:
            return _State.PROVED if self._handshake.is_confirmed_by(message) else _State.WRONG
        return self._judge_hello(DownstreamHandshake(key, message), hellos_seen)

    def _judge_hello(self, handshake: DownstreamHandshake, hellos_seen: set[bytes]) -> _State:
        if not handshake.is_hello_right or handshake.peer_nonce in hellos_seen:
            return _State.WRONG if handshake.speaks_our_protocol else _State.RUBBISH
        hellos_seen.add(handshake.peer_nonce)
        self._handshake = handshake
        try:
            self._connection.sendall(handshake.answer)
        except OSError:
            return _State.GONE
        return _State.PENDING


def _listen(addresses: Sequence[str]) -> dict[str, socket.socket]:
    """Return a listening socket for each address that can be bound; all share one port if a common port is free."""
    allowed = ports_to_try()
    attempts = allowed if allowed != [0] else allowed * _PORT_ATTEMPTS
    for attempt, wanted in enumerate(attempts, 1):
        sockets: dict[str, socket.socket] = {}
        problems: dict[str, OSError] = {}
        port = wanted
        for address in addresses:
            try:
                sockets[address] = _listen_on(address, port)
                port = sockets[address].getsockname()[1]
            except OSError as error:
                problems[address] = error
        is_last = attempt == len(attempts)
        if is_last or not any(problem.errno == errno.EADDRINUSE for problem in problems.values()):
            break
        for listening in sockets.values():
            listening.close()
    if not sockets:
        tried = ", ".join(f"{address}: {problem.strerror or problem}" for address, problem in problems.items())
        raise CoordinationError(
            f"cannot listen on any address of this host ({tried or 'it has none'}): set GLOO_SOCKET_IFNAME, a wider "
            f"{PORTS_VARIABLE}, or let nodes send one another nothing: scope='node', delivery='read'"
        )
    return sockets


def _listen_on(address: str, port: int) -> socket.socket:
    flags = socket.AI_NUMERICHOST | socket.AI_PASSIVE
    family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
    listening = socket.create_server(cast("tuple[str, int]", place), family=family, backlog=_BACKLOG)
    listening.setblocking(False)
    return listening
