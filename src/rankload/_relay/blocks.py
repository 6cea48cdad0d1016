"""Blocks to send: bytes in memory, or a range of a file."""

from __future__ import annotations

import os
from typing import Protocol

from rankload.errors import LoadError


class Block(Protocol):
    """The next bytes of the stream."""

    def __len__(self) -> int:
        """Return how many they are."""

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes from begin to end."""


class BytesBlock:
    """Bytes in memory."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory.cast("B")

    def __len__(self) -> int:
        """See `Block`."""
        return len(self._memory)

    def read(self, begin: int, end: int) -> memoryview:
        """See `Block`."""
        return self._memory[begin:end]


class FileBlock:
    """Bytes of an open file.

    They are read into memory first, and not passed to sendfile(2): the bytes sent must be the bytes hashed, even if
    somebody writes to the file meanwhile.

    Raises (on reading):
        LoadError: the file cannot be read, or has become shorter.
    """

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length

    def __len__(self) -> int:
        """See `Block`."""
        return self._length

    def read(self, begin: int, end: int) -> memoryview:
        """See `Block`."""
        content = self._read(begin, end)
        while len(content) < end - begin:  # rare: pread(2) stops early at a signal, and on some network filesystems
            more = self._read(begin + len(content), end)
            if not more:
                raise LoadError("the file has become shorter while it was sent: who has cut it off?")
            content += more
        return memoryview(content)

    def _read(self, begin: int, end: int) -> bytes:
        try:
            return os.pread(self._descriptor, end - begin, self._offset + begin)
        except OSError as error:
            raise LoadError(f"cannot read the file that is to be sent: {error.strerror}", errno=error.errno) from error
