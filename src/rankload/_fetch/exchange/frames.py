"""What goes over a connection between two nodes of the ring. Pure.

Downstream go units: a head (number and length), the bytes, and a tag that only nodes of the job can make. The tag is an
HMAC of the head and of the SHA-256 of the bytes; its key reaches the nodes through the job's store. The first node that
has a unit makes the tag, and every node that gets the unit verifies it before it writes or forwards the bytes: a fault
is noticed where it happens. The unit `END` says that no more will come.

Upstream go the numbers of units that a node fetches from the origin although it was not to, and need not be sent.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from rankload.errors import CoordinationError

TAG_BYTES = 32

#: Number of the empty unit that ends the stream of units.
END = (1 << 64) - 1

_LABEL = b"rankload exchange unit\0"
_HEAD = struct.Struct("<QQ")
_HAVE = struct.Struct("<Q")

HEAD_BYTES, HAVE_BYTES = _HEAD.size, _HAVE.size


def head_of(unit: int, length: int) -> bytes:
    """Return the head of a unit: its number, and its length in bytes."""
    return _HEAD.pack(unit, length)


def read_head(head: bytes) -> tuple[int, int]:
    """Return number and length of a unit."""
    unit, length = _HEAD.unpack(head)
    return unit, length


def have(unit: int) -> bytes:
    """Return the message that a unit need not be sent."""
    return _HAVE.pack(unit)


def read_haves(messages: bytes | bytearray) -> list[int]:
    """Return the units that need not be sent."""
    return [unit for (unit,) in _HAVE.iter_unpack(messages)]


def tag_of(key: bytes, head: bytes, content: bytes | bytearray) -> bytes:
    """Return the tag of a unit."""
    return hmac.digest(key, _LABEL + head + hashlib.sha256(content).digest(), "sha256")


def check_tag(key: bytes, head: bytes, content: bytes | bytearray, tag: bytes, sender: str) -> None:
    """Check the tag of a unit that was received.

    Raises:
        CoordinationError: the bytes are not those that the sender sent.
    """
    if not hmac.compare_digest(tag, tag_of(key, head, content)):
        raise CoordinationError(
            f"the bytes of unit {read_head(head)[0]} from {sender} differ from those that it sent: something between "
            "the nodes changes them; nothing was published; check the network, choose another one by "
            "GLOO_SOCKET_IFNAME, or pass scope='node'"
        )
