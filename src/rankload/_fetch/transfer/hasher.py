"""Hash out-of-order byte ranges in file order on a background thread."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable

from rankload._platform.byte_ranges import ByteRanges
from rankload._platform.clock import NoProgressTimer
from rankload.errors import CacheError

#: Most bytes of pieces that wait in memory for the hash. Further pieces are read back later from the page cache: the
#: hash is at most a few chunks per stream behind the newest byte.
_MEMORY_BYTES = 64 << 20

_READ_BYTES = 1 << 20

_REPORT_SECONDS = 0.1

#: Longest time that one wait may count. A longer one means that this process was stopped.
_MAX_WAIT_SECONDS = 6.0

_ABORT_SECONDS = 0.3


class OrderedHasher:
    """Records which bytes of a file are written, and hashes them in file order on a thread.

    hashlib releases the GIL, so the transfer goes on meanwhile.

    Args:
        descriptor: open file, from which pieces are read that are not in memory. The caller closes it.

    Attributes:
        covered: ranges of the bytes that are written.
    """

    def __init__(self, descriptor: int) -> None:
        self.covered = ByteRanges()
        self._hashing_seconds = 0.0
        self._descriptor = descriptor
        self._pieces: dict[int, bytes | bytearray] = {}
        self._memory_bytes = 0
        self._position = 0
        self._is_complete = self._is_aborted = False
        self._digest = hashlib.sha256()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rankload-digest", daemon=True)

    def start(self) -> None:
        """Start the thread. Afterwards, and even after an error in this call, call `finish` or `abort`."""
        self._thread.start()

    @property
    def done_bytes(self) -> int:
        """Number of bytes that are written."""
        return self.covered.total_bytes

    @property
    def hash_bytes_per_second(self) -> float:
        """Speed of the hash while it works; infinite before the first byte."""
        return self._position / self._hashing_seconds if self._hashing_seconds else math.inf

    def has(self, begin: int, end: int) -> bool:
        """Return whether a range is written."""
        with self._changed:
            return self.covered.end_of(begin) >= end

    def adopt(self, begin: int, end: int) -> None:
        """Add bytes that are in the file already. They are hashed like all others."""
        with self._changed:
            self.covered.add(begin, end)
            self._changed.notify()

    def offer(self, offset: int, piece: bytes | bytearray) -> None:
        """Add a piece that was written to the file, and does not change any more. Never waits for the hash."""
        with self._changed:
            self.covered.add(offset, offset + len(piece))
            if self._memory_bytes + len(piece) <= _MEMORY_BYTES:
                self._pieces[offset] = piece
                self._memory_bytes += len(piece)
            self._changed.notify()

    def finish(self, on_bytes: Callable[[int], None], timeout_seconds: float) -> str:
        """Hash the remaining bytes; return the hex digest of all bytes from 0 up to the first gap.

        Args:
            on_bytes: called repeatedly with the number of bytes hashed so far.
            timeout_seconds: no-progress deadline in seconds: time without a byte hashed.

        Raises:
            CacheError: the written bytes cannot be read back, or not in time.
        """
        with self._changed:
            self._is_complete = True
            self._changed.notify()
        self._thread.join(_REPORT_SECONDS)
        no_progress = NoProgressTimer(self._position, _MAX_WAIT_SECONDS)
        while self._thread.is_alive():
            on_bytes(self._position)
            if no_progress.seconds_without_progress(self._position) > timeout_seconds:
                raise CacheError(
                    f"cannot read back the downloaded bytes: the disk has not answered for {timeout_seconds:g} s"
                )
            self._thread.join(_REPORT_SECONDS)
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Stop the thread without a digest. A thread that waits for a broken disk is left behind: it only reads."""
        with self._changed:
            self._is_aborted = True
            self._changed.notify()
        if self._thread.is_alive():  # a signal may have prevented its start
            self._thread.join(_ABORT_SECONDS)

    def _run(self) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        try:
            while (found := self._next(buffer)) is not None:
                began_at = time.monotonic()
                self._digest.update(found)
                self._position += len(found)
                self._hashing_seconds += time.monotonic() - began_at
        except OSError as error:
            self._error = CacheError(f"cannot read back the downloaded bytes: {error}", errno=error.errno)
        except Exception as error:
            self._error = error

    def _next(self, buffer: memoryview) -> memoryview | bytes | bytearray | None:
        """Wait for the next bytes in file order; return None if no more will come."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_aborted or self._is_complete or self.covered.end_of(self._position) > self._position
            )
            end = self.covered.end_of(self._position)
            if self._is_aborted or end <= self._position:
                return None
            if (piece := self._pieces.pop(self._position, None)) is not None:
                self._memory_bytes -= len(piece)
                return piece
            nearest = min((offset for offset in self._pieces if offset > self._position), default=end)
        return self._read_back(buffer[: min(nearest, end) - self._position])

    def _read_back(self, buffer: memoryview) -> memoryview:
        count = os.preadv(self._descriptor, [buffer], self._position)
        if not count:
            raise OSError(f"the file ends at {self._position}")
        return buffer[:count]
