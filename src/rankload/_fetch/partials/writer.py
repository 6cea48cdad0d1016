"""One thread's revocable access to a partial file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from rankload._fetch.partials.open_file import OpenFile
from rankload._platform.linux import start_writeback


class PartialWriter:
    """Writes until it is closed: by its thread, or by whoever has left that thread behind. Then it does nothing.

    A read that nobody could break off may come back long after its transfer has ended, with a piece of what the file
    was to become then, and may find it half filled with something else.

    Args:
        file: lends the descriptor.
        wrap_write_errors: translates the failures.
        note: told of the ranges that were written.

    Raises:
        CacheError: no descriptor is left.
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

    def write(self, piece: bytes, offset: int) -> None:
        """Write a piece at an offset."""
        view = memoryview(piece)
        with self._lock, self._wrap_write_errors():
            while view and not self.is_closed:  # pwrite(2) may take less, on a nearly full disk for one
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count

    def finished(self, begin: int, end: int) -> None:
        """Note that a range is written, and let it go to disk."""
        with self._lock:
            if begin < end and not self.is_closed:
                self._note(begin, end)
                start_writeback(self._descriptor, begin, end - begin)

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock, self._wrap_write_errors():
            self.is_closed = True
            self._lent.close()
