"""SHA-256 of an existing file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from rankload._formats.source import open_regular

_READ_BYTES = 4 << 20


def sha256_of_file(path: Path, on_bytes: Callable[[int], None]) -> str:
    """Return a file's SHA-256 in hex digits. ``on_bytes`` is called with the number of bytes hashed so far.

    Raises:
        OSError: the file cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            on_bytes(done)
    return digest.hexdigest()
