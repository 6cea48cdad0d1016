"""One thread's revocable access to a partial file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from rankload._fetch.partials.open_file import OpenFile
from rankload._platform.linux import start_writeback


class PartialWriter:
    """The `Writer` of one thread. After `close`, by its thread or another, it writes nothing.

    A read that could not be broken off may return long after its transfer has ended. By then, the file may be half
    filled with other content, which the late piece must not overwrite.

    Args:
        file: file that lends the descriptor.
        wrap_write_errors: translates errors.
        note: called with the begin and end of each range that was written.

    Raises:
        CacheError: no file descriptor is left.
    """

    def __init__(
        self,
        file: OpenFile,
        wrap_write_errors: Callable[[], AbstractContextManager[None]],
        note: Callable[[int, int], None],
    ) -> None:
        self._wrap_write_errors, self._note = wrap_write_errors, note
        self._lent, self._lock = ExitStack(), threading.Lock()
        self.is_closed = False
        with wrap_write_errors():
            self._descriptor = self._lent.enter_context(file.lent())

    def write(self, piece: bytes | bytearray, offset: int) -> None:
        """Write a piece at an offset. Raise CacheError if the disk is full or broken."""
        view = memoryview(piece)
        with self._lock, self._wrap_write_errors():
            while view and not self.is_closed:  # pwrite(2) may write less, for example on a nearly full disk
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count

    def finished(self, begin: int, end: int) -> None:
        """Record that a range is written, and start its write-back to disk."""
        with self._lock:
            if begin < end and not self.is_closed:
                self._note(begin, end)
                start_writeback(self._descriptor, begin, end - begin)

    def close(self, *, may_wait: bool = True) -> None:
        """Give the descriptor back. Do nothing while a write is running if this must not wait."""
        if not self._lock.acquire(blocking=may_wait):
            return
        try:
            with self._wrap_write_errors():
                self.is_closed = True
                self._lent.close()
        finally:
            self._lock.release()
