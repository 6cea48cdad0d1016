"""The limit on the size of an unpacked archive."""

from __future__ import annotations

#: How many times its own size an archive may take unpacked. Trained weights shrink by a tenth or so; deflate can reach
#: 1032 (RFC 1951).
MAX_RATIO = 20

#: Up to this size unpacked the ratio does not count: a small checkpoint may well be nothing but zeros.
ALWAYS_ALLOWED_BYTES = 64 << 20


def unpacked_limit(packed_bytes: int) -> int:
    """Return the size in bytes up to which an archive is unpacked."""
    return max(MAX_RATIO * packed_bytes, ALWAYS_ALLOWED_BYTES)
