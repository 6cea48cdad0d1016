"""The interface of the file that a transfer writes to."""

from __future__ import annotations

from typing import Protocol

from rankload._fetch.origins.origin import Version


class Target(Protocol):
    """The file that a transfer writes to."""

    def make_room(self, version: Version, *, is_resumable: bool) -> None:
        """Prepare for a version of the file, before the first byte is written.

        Args:
            version: version that the origin serves.
            is_resumable: whether a later download can continue with a part of the bytes.

        Raises:
            CacheError: there is no room for the file.
        """

    def writer(self) -> Writer:
        """Return a writer for one thread.

        Raises:
            CacheError: no file descriptor is left.
        """


class Writer(Protocol):
    """One thread's access to the target. Close it when done."""

    def write(self, piece: bytes, offset: int) -> None:
        """Write a piece at an offset.

        Raises:
            CacheError: the disk is full or broken.
        """

    def finished(self, begin: int, end: int) -> None:
        """Record that a range has been written."""

    def close(self) -> None:
        """Release the file descriptor."""
