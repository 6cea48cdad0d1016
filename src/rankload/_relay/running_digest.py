"""Hash a block with SHA-256 while its bytes are in flight."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

#: Smaller amounts are not worth a switch to another thread: the caller hashes small blocks.
_WORTH_HANDING_OVER_BYTES = 256 << 10


class BackgroundDigest:
    """A SHA-256 that is computed on a second thread while sockets transfer bytes. Use as a context manager.

    hashlib releases the GIL. Memory passed to `update` must not change until the next `digest`.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._collected: list[memoryview] = []
        self._collected_bytes = 0
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def update(self, memory: memoryview) -> None:
        """Add bytes to the digest."""
        self._collected.append(memory)
        self._collected_bytes += len(memory)
        if self._collected_bytes >= _WORTH_HANDING_OVER_BYTES:
            self._pool = self._pool or ThreadPoolExecutor(1, "rankload-digest")
            self._last = self._pool.submit(self._hash, self._collected)
            self._collected, self._collected_bytes = [], 0

    def digest(self) -> bytes:
        """Return the digest of all bytes so far."""
        if self._last is not None:
            self._last.result()
        self._hash(self._collected)
        self._collected, self._collected_bytes = [], 0
        return self._sha256.digest()

    def __enter__(self) -> BackgroundDigest:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _hash(self, parts: list[memoryview]) -> None:
        for part in parts:
            self._sha256.update(part)
