"""The handshake of two neighbours that share a key through the job's store. Pure, apart from random numbers.

::

    upstream -> downstream   magic, nonce_u, HMAC(key, "hello" | nonce_u)
    downstream -> upstream   nonce_d, HMAC(key, "downstream" | nonce_u | nonce_d)
    upstream -> downstream   HMAC(key, "upstream" | nonce_u | nonce_d)

Each MAC also covers the magic number. The key never crosses the connection. Both sides contribute a nonce, so a
recorded handshake proves nothing later. Each MAC covers the sender's role, so no message can be reflected to its
sender. All messages have a fixed length.
"""

from __future__ import annotations

import hmac
import secrets

#: Protocol name and version. Not a secret: it distinguishes a stray client from an attacker who guesses the key.
MAGIC = b"rkrelay\x02"

KEY_BYTES = 32
NONCE_BYTES = 32
_MAC_BYTES = 32

HELLO_BYTES = len(MAGIC) + NONCE_BYTES + _MAC_BYTES
ANSWER_BYTES = NONCE_BYTES + _MAC_BYTES
CONFIRMATION_BYTES = _MAC_BYTES


class UpstreamHandshake:
    """The connecting side of the handshake.

    Args:
        key: the listener's key, `KEY_BYTES` long.

    Attributes:
        hello: the first message.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._nonce = key, secrets.token_bytes(NONCE_BYTES)
        self.hello = MAGIC + self._nonce + _mac(key, b"hello", self._nonce)

    def confirm(self, answer: bytes) -> bytes | None:
        """Return the last message; None if the answer does not prove knowledge of the key."""
        nonce, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        if not hmac.compare_digest(proof, _mac(self._key, b"downstream", self._nonce, nonce)):
            return None
        return _mac(self._key, b"upstream", self._nonce, nonce)


class DownstreamHandshake:
    """The listening side of the handshake.

    Args:
        key: the listener's key, `KEY_BYTES` long.
        hello: the whole first message from upstream.
    """

    def __init__(self, key: bytes, hello: bytes) -> None:
        self.peer_nonce, proof = hello[len(MAGIC) : -_MAC_BYTES], hello[-_MAC_BYTES:]
        self.speaks_our_protocol = hello.startswith(MAGIC)
        # compute the MAC even without the magic number, so that every wrong hello takes the same time
        is_right = hmac.compare_digest(proof, _mac(key, b"hello", self.peer_nonce))
        self.is_hello_right = is_right and self.speaks_our_protocol
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.answer = nonce + _mac(key, b"downstream", self.peer_nonce, nonce)
        self._expected = _mac(key, b"upstream", self.peer_nonce, nonce)

    def is_confirmed_by(self, confirmation: bytes) -> bool:
        """Return whether the last message proves that upstream knows the key and still wants this connection."""
        return hmac.compare_digest(confirmation, self._expected)


def _mac(key: bytes, role: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(key, b"\0".join((MAGIC, role, b"".join(nonces))), "sha256")
