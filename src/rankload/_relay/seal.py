"""Authenticate what goes through the chain. Pure.

The source tags each piece of a block with an HMAC. Its key reaches the ranks through the job's store, so whoever sits
between two nodes can read the bytes, but cannot change, drop, repeat or reorder pieces unnoticed. A tag covers the
SHA-256 of the block up to the end of its piece: one pass over the bytes gives both the tags and the block's digest.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Iterator

KEY_BYTES = 32
TAG_BYTES = 32

#: Bytes between two tags: no rank passes on more that it has not verified.
PIECE_BYTES = 1 << 20

_LABEL = b"rankload relay piece\0"


def new_key() -> bytes:
    """Return a key for one stream."""
    return secrets.token_bytes(KEY_BYTES)


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """Yield where the pieces of a block of this length begin and end."""
    for begin in range(0, length, PIECE_BYTES):
        yield begin, min(begin + PIECE_BYTES, length)


class Seal:
    """Makes the tags of one stream in their order. Source and receivers come to the same ones.

    Args:
        key: the stream's, from `new_key`.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._count = key, 0

    def next_tag(self, block_bytes: int, end: int, digest: bytes) -> bytes:
        """Return the tag of the next piece of the stream.

        Args:
            block_bytes: length of the block that it belongs to.
            end: where in the block it ends.
            digest: SHA-256 of the block up to there.
        """
        message = _LABEL + struct.pack("<QQQ", self._count, block_bytes, end) + digest
        self._count += 1
        return hmac.digest(self._key, message, "sha256")
