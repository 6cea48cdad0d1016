"""A file that several threads write and sync, without losing an error that only one of them sees."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class OpenFile:
    """An open file that lends its descriptor.

    A network filesystem reports a full disk or a broken one when data is written back: to whoever syncs or closes
    next, once (fsync(2), close(2)). That may be a thread which nobody listens to any more, so failures are kept.

    Args:
        descriptor: open for reading and writing; it is this object's from now on.

    Attributes:
        descriptor: -1 when it is closed.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._changed = threading.Condition()
        self._lent = 0
        self._failure: OSError | None = None

    @contextmanager
    def lent(self) -> Iterator[int]:
        """Lend a descriptor to a thread.

        A duplicate: a thread that was left behind in a connection attempt must not write to whatever has got the number
        of a descriptor that was closed meanwhile.

        Raises:
            OSError: what the kernel says when it is closed.
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
        """Wait until all that was lent is back.

        Raises:
            OSError: a write, sync or close has failed, in whatever thread.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._lent, timeout_seconds):
                raise TimeoutError(f"not everything was written within {timeout_seconds:g} s")
        if self._failure is not None:
            raise self._failure

    def sync_and_close(self, timeout_seconds: float) -> None:
        """Wait until all that was lent is back, force the bytes to disk and close.

        Raises:
            OSError: a write, sync or close has failed, in whatever thread.
        """
        self.settle(timeout_seconds)
        os.fsync(self.descriptor)
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)

    def close(self) -> None:
        """Close without a word."""
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
