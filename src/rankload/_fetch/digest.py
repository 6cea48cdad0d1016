"""SHA-256 in a thread of its own: while the bytes arrive, or over a file that is there."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path

_READ_BYTES = 4 << 20

#: Bytes that may wait for the hash: enough to ride out a hiccup, little enough to notice a slow CPU.
_MAX_QUEUED_PIECES = 64


class DigestThread:
    """Hashes pieces in the order given. hashlib releases the GIL, so the download goes on meanwhile."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._error: BaseException | None = None
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_MAX_QUEUED_PIECES)
        self._thread = threading.Thread(target=self._run, name="rankload-digest", daemon=True)
        self._thread.start()

    def update(self, piece: bytes) -> None:
        """Hash a piece later; waits while too many are queued."""
        self._pieces.put(piece)

    def finish(self) -> str:
        """Wait for the queued pieces; return the hex digest. Ends the thread, so it must be called in any case."""
        self._pieces.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is not None:
                continue  # take the rest all the same, or update() would wait for ever on a full queue
            try:
                self._digest.update(piece)
            except BaseException as error:
                self._error = error


def sha256_of_file(path: Path, on_bytes: Callable[[int], None]) -> str:
    """Return a file's hex digest; ``on_bytes`` gets the number of bytes hashed so far.

    Raises:
        OSError: the file cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            on_bytes(done)
    return digest.hexdigest()
