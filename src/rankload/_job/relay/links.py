"""The connections of the chain: each made by the upstream rank, and each with proof that it is the right process."""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rankload._errors import CoordinationError

#: Called again and again during a wait; raises what another rank has failed with.
LookAround = Callable[[], None]

#: Between two looks around.
_LOOK_SECONDS = 0.2

#: How long one address may take to answer: the others may be better.
_ONE_ADDRESS_SECONDS = 5.0

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
        self._asked, self._answered = (secrets.token_bytes(_TOKEN_BYTES) for _ in range(2))
        self._addresses = addresses

    @property
    def way(self) -> dict[str, Any]:
        """Return what the upstream rank has to know."""
        return {
            "addresses": list(self._addresses),
            "port": self._socket.getsockname()[1],
            "asked": self._asked.hex(),
            "answered": self._answered.hex(),
        }

    def accept(self, rank: int, host: str, look_around: LookAround) -> Link:
        """Wait for the upstream rank.

        The wait ends with what ``look_around`` raises: a failure, or that the upstream rank is lost or does not move.
        """
        self._socket.settimeout(_LOOK_SECONDS)
        while True:
            look_around()
            with suppress(TimeoutError, ConnectionError):
                connection, _ = self._socket.accept()
                if self._is_upstream(connection):
                    return Link(rank, host, _prepared(connection))
                connection.close()

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def _is_upstream(self, connection: socket.socket) -> bool:
        connection.settimeout(_ONE_ADDRESS_SECONDS)
        with suppress(OSError):
            if hmac.compare_digest(_receive_token(connection), self._asked):
                connection.sendall(self._answered)
                return True
        return False


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
    except OSError:
        connection.close()
        raise
    return _prepared(connection)


def _receive_token(connection: socket.socket) -> bytes:
    token = b""
    while len(token) < _TOKEN_BYTES:
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
