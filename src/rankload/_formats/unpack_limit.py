"""The limit on the size of an unpacked archive."""

from __future__ import annotations

#: Largest ratio of unpacked to packed size. Trained weights shrink by a tenth or so; deflate can reach 1032 (RFC 1951).
MAX_RATIO = 20

#: Unpacked size up to which any ratio is allowed: a small checkpoint may well be nothing but zeros.
ALWAYS_ALLOWED_BYTES = 64 << 20


def unpacked_limit(packed_bytes: int) -> int:
    """Return the largest unpacked size in bytes that an archive of ``packed_bytes`` may have."""
    return max(MAX_RATIO * packed_bytes, ALWAYS_ALLOWED_BYTES)
