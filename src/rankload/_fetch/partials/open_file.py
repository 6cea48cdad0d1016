"""A file that several threads write and sync, without losing an error that only one of the threads gets."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class OpenFile:
    """An open file that lends its descriptor to threads.

    A network filesystem reports a full or broken disk when it writes data back, and only once: to the next caller of
    fsync(2) or close(2). That caller may be a thread that was left behind. So this object keeps every failure.

    Args:
        descriptor: file descriptor, open for reading and writing. This object closes it.

    Attributes:
        descriptor: the file descriptor; -1 after it is closed.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._changed = threading.Condition()
        self._lent = 0
        self._failure: OSError | None = None

    @contextmanager
    def lent(self) -> Iterator[int]:
        """Lend a duplicate of the descriptor to a thread.

        With the original, a thread that was left behind in a connection attempt could write to another file, which has
        received the number of the closed descriptor.

        Raises:
            OSError: the duplicate could not be made or closed.
        """
        with self._changed:
            descriptor = os.dup(self.descriptor)
            self._lent += 1
        try:
            with self._noting_failures():
                try:
                    yield descriptor
                finally:
                    os.close(descriptor)
        finally:
            with self._changed:
                self._lent -= 1
                self._changed.notify_all()

    def settle(self, timeout_seconds: float) -> None:
        """Wait until all lent descriptors are back.

        Raises:
            TimeoutError: not all are back within ``timeout_seconds``.
            OSError: a write, sync or close failed in any thread.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._lent, timeout_seconds):
                raise TimeoutError(f"not everything was written within {timeout_seconds:g} s")
        if self._failure is not None:
            raise self._failure

    def sync_and_close(self, timeout_seconds: float) -> None:
        """Wait until all lent descriptors are back, force the bytes to disk and close the file.

        Raises:
            OSError: a write, sync or close failed in any thread, or not all descriptors are back in time.
        """
        self.settle(timeout_seconds)
        os.fsync(self.descriptor)
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)

    def close(self) -> None:
        """Close the file, and ignore errors."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failure = self._failure or error
            raise
