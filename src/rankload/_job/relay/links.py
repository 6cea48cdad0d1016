"""The connections of the chain: each made by the upstream rank, and each with proof that it is the right process.

Upstream asks, downstream answers, upstream confirms. Without the last word, downstream could take a connection that
upstream has given up meanwhile, for want of an answer.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, cast

from rankload._errors import CoordinationError

#: Called again and again during a wait; raises what another rank has failed with.
LookAround = Callable[[], None]

#: Between two looks around.
_LOOK_SECONDS = 0.2

#: How long one address may take to be connected to, and then to answer: the others may be better.
_ONE_ADDRESS_SECONDS = 5.0

#: How long whoever has connected may take to show that it is upstream.
_CANDIDATE_SECONDS = 30.0

_TOKEN_BYTES = 32


@dataclass(frozen=True)
class Link:
    """A connection to another rank.

    Attributes:
        rank: the other one.
        host: its host's name, for messages.
        socket: does not block.
    """

    rank: int
    host: str
    socket: socket.socket


class Listener:
    """Where the upstream rank is to connect. The store tells it the way, and the tokens: nobody else knows them.

    Args:
        addresses: of this host.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._socket = _listen()
        self._socket.setblocking(False)
        self._asked, self._answered, self._confirmed = (secrets.token_bytes(_TOKEN_BYTES) for _ in range(3))
        self._addresses = addresses

    @property
    def way(self) -> dict[str, Any]:
        """Return what the upstream rank has to know."""
        return {
            "addresses": list(self._addresses),
            "port": self._socket.getsockname()[1],
            "asked": self._asked.hex(),
            "answered": self._answered.hex(),
            "confirmed": self._confirmed.hex(),
        }

    def accept(self, rank: int, host: str, look_around: LookAround) -> Link:
        """Wait for the upstream rank.

        The wait ends with what ``look_around`` raises: a failure, or that the upstream rank is lost or does not move.
        """
        with ExitStack() as rejecting, selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            candidates: dict[socket.socket, _Candidate] = {}
            while True:
                look_around()
                for key, _ in selector.select(_LOOK_SECONDS):
                    if key.fileobj is self._socket:
                        with suppress(BlockingIOError, ConnectionError):
                            connection, _ = self._socket.accept()
                            candidates[connection] = _Candidate(
                                connection, self._asked, self._answered, self._confirmed
                            )
                            rejecting.callback(candidates[connection].reject)
                            selector.register(connection, selectors.EVENT_READ)
                    elif candidates[connection := cast("socket.socket", key.fileobj)].has_proved():
                        candidates[connection].is_taken = True
                        return Link(rank, host, _prepared(connection))
                for connection, candidate in [*candidates.items()]:
                    if candidate.is_out:
                        selector.unregister(connection)
                        candidates.pop(connection).reject()

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


class _Candidate:
    """Somebody who has connected, and may be the upstream rank. Waiting for its words keeps nobody else waiting.

    Attributes:
        is_out: it has said something else, or nothing in time.
        is_taken: it has proved itself.
    """

    def __init__(self, connection: socket.socket, asked: bytes, answered: bytes, confirmed: bytes) -> None:
        self._connection, self._expected, self._answered = connection, asked + confirmed, answered
        self._said = b""
        self._deadline = time.monotonic() + _CANDIDATE_SECONDS
        self._has_failed = self.is_taken = False
        connection.setblocking(False)

    def has_proved(self) -> bool:
        """Read what it says; tell whether it has said all that only the upstream rank knows."""
        try:
            # not a byte more than a token: what comes behind the last one is for the relay
            more = self._connection.recv(_TOKEN_BYTES - len(self._said) % _TOKEN_BYTES)
            self._said += more
            if not more or not hmac.compare_digest(self._said, self._expected[: len(self._said)]):
                self._has_failed = True
            elif len(self._said) == _TOKEN_BYTES:
                self._connection.sendall(self._answered)
        except BlockingIOError:
            pass
        except OSError:
            self._has_failed = True
        return not self._has_failed and len(self._said) == len(self._expected)

    @property
    def is_out(self) -> bool:
        return self._has_failed or time.monotonic() > self._deadline

    def reject(self) -> None:
        """Close the connection, unless it is taken."""
        if not self.is_taken:
            self._connection.close()


def connect(rank: int, host: str, way: dict[str, Any], seconds: float, look_around: LookAround) -> Link:
    """Connect to a downstream rank.

    Args:
        rank: it.
        host: its host's name.
        way: its `Listener.way`.
        seconds: after which it counts as out of reach.
        look_around: called between two attempts.

    Raises:
        CoordinationError: no address leads to it.
    """
    deadline = time.monotonic() + seconds
    problems: dict[str, str] = {}
    while not problems or time.monotonic() < deadline:
        for address in way["addresses"]:
            look_around()
            try:
                return Link(rank, host, _connect(address, way))
            except OSError as error:
                problems[address] = error.strerror or str(error)
        time.sleep(_LOOK_SECONDS)
    tried = ", ".join(f"{address}: {problem}" for address, problem in problems.items())
    raise CoordinationError(
        f"cannot reach rank {rank} on {host} at port {way['port']} ({tried}): a firewall between the nodes, or another "
        "interface; set GLOO_SOCKET_IFNAME, or pass delivery='read'",
        unreachable_rank=rank,
    )


def _connect(address: str, way: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection((address, way["port"]), timeout=_ONE_ADDRESS_SECONDS)
    try:
        connection.sendall(bytes.fromhex(way["asked"]))
        if not hmac.compare_digest(_receive_token(connection), bytes.fromhex(way["answered"])):
            raise ConnectionError("another process listens there")
        connection.sendall(bytes.fromhex(way["confirmed"]))
    except OSError:
        connection.close()
        raise
    return _prepared(connection)


def _receive_token(connection: socket.socket) -> bytes:
    token, deadline = b"", time.monotonic() + _ONE_ADDRESS_SECONDS
    while len(token) < _TOKEN_BYTES:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        if not (more := connection.recv(_TOKEN_BYTES - len(token))):
            raise ConnectionError("closed by the other side")
        token += more
    return token


def _prepared(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    return connection


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 may be switched off all the same
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
