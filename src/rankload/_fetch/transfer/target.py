"""The interface of the file that a transfer writes to."""

from __future__ import annotations

from typing import Protocol

from rankload._fetch.origins.origin import Version


class Target(Protocol):
    """Where the bytes go."""

    def make_room(self, version: Version, *, is_resumable: bool) -> None:
        """Prepare for what comes; called before the first byte is written.

        Raises:
            CacheError: there is no room.
        """

    def writer(self) -> Writer:
        """Return a way in, for one thread.

        Raises:
            CacheError: there is none left.
        """


class Writer(Protocol):
    """One thread's way into the target; close it when done."""

    def write(self, piece: bytes, offset: int) -> None:
        """Write a piece at an offset.

        Raises:
            CacheError: the disk is full, or broken.
        """

    def finished(self, begin: int, end: int) -> None:
        """Note that a range has been written."""

    def close(self) -> None:
        """Let go of it."""
