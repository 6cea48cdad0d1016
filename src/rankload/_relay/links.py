"""Connections of the chain: the upstream rank connects, and both sides prove that they belong to the job.

Upstream sends a hello, downstream answers, upstream confirms (see `handshake`). Without the confirmation, downstream
could accept a connection that upstream has given up after waiting too long for the answer.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rankload._relay.handshake import ANSWER_BYTES, UpstreamHandshake
from rankload.errors import CoordinationError, RankLostError

#: Check on the other ranks, repeatedly during a wait. Raises another rank's error.
LookAround = Callable[[], None]

#: Interval between two checks on the other ranks.
LOOK_SECONDS = 0.2

#: After a connection broke, how long to wait for the other rank's error: a failing rank reports its error, then leaves.
WORD_SECONDS = 2.0

#: Time limit for connecting to one address, and again for its answer: another address may work.
_ONE_ADDRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Link:
    """A connection to another rank.

    Attributes:
        rank: the other rank.
        host: name of the other rank's host, for messages.
        socket: the connection, in non-blocking mode.
    """

    rank: int
    host: str
    socket: socket.socket

    def broken(self, error: OSError | None) -> RankLostError:
        """Return the error for a connection that broke; without an error, the other side has closed it."""
        why = "closed" if error is None else error.strerror or str(error)
        return RankLostError(
            f"the connection to rank {self.rank} on {self.host} broke ({why}): the rank was killed, or its node or the "
            "network failed",
            lost_rank=self.rank,
            lost_host=self.host,
        )


def connect(rank: int, host: str, way: dict[str, Any], seconds: float, look_around: LookAround) -> Link:
    """Connect to a downstream rank.

    Args:
        rank: global rank to connect to.
        host: name of that rank's host.
        way: the `Listener.way` of that rank.
        seconds: time after which the rank counts as unreachable.
        look_around: called before each attempt.

    Raises:
        CoordinationError: the rank cannot be reached at any of its addresses.
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
        f"cannot reach rank {rank} on {host} at port {way['port']} ({tried}): a firewall between the nodes, or the "
        "wrong interface; set GLOO_SOCKET_IFNAME, or let nodes send one another nothing: scope='node', delivery='read'",
        unreachable_rank=rank,
    )


def prepared(connection: socket.socket) -> socket.socket:
    """Make a connection ready for the relay after its handshake, and return it."""
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
