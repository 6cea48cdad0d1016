"""Authenticate the bytes that go through the chain. Pure.

The source tags each piece of a block with an HMAC. The key reaches the ranks through the job's store. An attacker
between two nodes can read the bytes, but cannot change, drop, repeat or reorder pieces unnoticed. A tag covers the
SHA-256 of the block up to the end of its piece: one pass over the bytes gives all tags and the block's digest.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Iterator

KEY_BYTES = 32
TAG_BYTES = 32

#: Bytes between two tags: a rank forwards at most this many bytes before it verifies them.
PIECE_BYTES = 1 << 20

_LABEL = b"rankload relay piece\0"


def new_key() -> bytes:
    """Return a key for one stream."""
    return secrets.token_bytes(KEY_BYTES)


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end, in bytes, of the pieces of a block of this length."""
    for begin in range(0, length, PIECE_BYTES):
        yield begin, min(begin + PIECE_BYTES, length)


class Seal:
    """The tags of one stream, in order. Source and receivers compute the same tags.

    Args:
        key: key of the stream, from `new_key`.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._count = key, 0

    def next_tag(self, block_bytes: int, end: int, digest: bytes) -> bytes:
        """Return the tag of the next piece of the stream.

        Args:
            block_bytes: length of the piece's block.
            end: end of the piece in the block, in bytes.
            digest: SHA-256 of the block up to ``end``.
        """
        message = _LABEL + struct.pack("<QQQ", self._count, block_bytes, end) + digest
        self._count += 1
        return hmac.digest(self._key, message, "sha256")
