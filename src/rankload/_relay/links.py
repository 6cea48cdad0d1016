"""Connections of the chain: the upstream rank connects, and both sides prove that they belong to the job.

Upstream says hello, downstream answers, upstream confirms (see `handshake`). Without the confirmation, downstream could
take a connection that upstream has meanwhile given up because no answer came.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rankload._relay.handshake import ANSWER_BYTES, UpstreamHandshake
from rankload.errors import CoordinationError

#: Called again and again during a wait; raises what another rank has failed with.
LookAround = Callable[[], None]

#: Between two looks around.
LOOK_SECONDS = 0.2

#: How long one address may take to be connected to, and then to answer: the others may be better.
_ONE_ADDRESS_SECONDS = 5.0


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


def connect(rank: int, host: str, way: dict[str, Any], seconds: float, look_around: LookAround) -> Link:
    """Connect to a downstream rank.

    Args:
        rank: its global rank.
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
        time.sleep(LOOK_SECONDS)
    tried = ", ".join(f"{address}: {problem}" for address, problem in problems.items())
    raise CoordinationError(
        f"cannot reach rank {rank} on {host} at port {way['port']} ({tried}): a firewall between the nodes, or another "
        "interface; set GLOO_SOCKET_IFNAME, or pass delivery='read'",
        unreachable_rank=rank,
    )


def prepared(connection: socket.socket) -> socket.socket:
    """Return a connection whose handshake is over, ready for the relay."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    return connection


def _connect(address: str, way: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection((address, way["port"]), timeout=_ONE_ADDRESS_SECONDS)
    try:
        handshake = UpstreamHandshake(bytes.fromhex(way["key"]))
        connection.sendall(handshake.hello)
        confirmation = handshake.confirm(_receive(connection, ANSWER_BYTES))
        if confirmation is None:
            raise ConnectionError("another process listens there")
        connection.sendall(confirmation)
    except OSError:
        connection.close()
        raise
    return prepared(connection)


def _receive(connection: socket.socket, length: int) -> bytes:
    received, deadline = b"", time.monotonic() + _ONE_ADDRESS_SECONDS
    while len(received) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        if not (more := connection.recv(length - len(received))):
            raise ConnectionError("closed by the other side")
        received += more
    return received
