"""Units on the way from node to node: a head, the bytes, and a tag that only nodes of the job can make. Pure.

The tag is an HMAC of the head and of the SHA-256 of the bytes. Its key reaches the nodes through the job's store. The
owner makes it, and every node that gets the unit verifies it before it writes or forwards the bytes: a fault is noticed
where it happens.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from rankload.errors import CoordinationError

TAG_BYTES = 32

_LABEL = b"rankload exchange unit\0"
_HEAD = struct.Struct("<QQ")

HEAD_BYTES = _HEAD.size


def head_of(unit: int, length: int) -> bytes:
    """Return the head of a unit: its number, and its length in bytes."""
    return _HEAD.pack(unit, length)


def read_head(head: bytes) -> tuple[int, int]:
    """Return number and length of a unit."""
    unit, length = _HEAD.unpack(head)
    return unit, length


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
