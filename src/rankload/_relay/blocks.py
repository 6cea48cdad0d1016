"""Blocks to send: bytes in memory, or a range of a file."""

from __future__ import annotations

import os
from typing import Protocol

from rankload.errors import LoadError


class Block(Protocol):
    """The next bytes of the stream."""

    def __len__(self) -> int:
        """Return the number of bytes in the block."""

    def read(self, begin: int, end: int) -> memoryview:
        """Return bytes ``begin`` to ``end`` of the block."""


class BytesBlock:
    """Bytes in memory."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory.cast("B")

    def __len__(self) -> int:
        return len(self._memory)

    def read(self, begin: int, end: int) -> memoryview:
        """Return bytes ``begin`` to ``end`` of the memory."""
        return self._memory[begin:end]


class FileBlock:
    """A range of an open file.

    Bytes are read into memory instead of passed to sendfile(2): the bytes sent must be the bytes hashed, even if
    another process writes to the file meanwhile.

    Raises (on reading):
        LoadError: the file cannot be read, or has become shorter.
    """

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length

    def __len__(self) -> int:
        return self._length

    def read(self, begin: int, end: int) -> memoryview:
        """Read bytes ``begin`` to ``end`` of the range.

        Raises:
            LoadError: the file cannot be read, or has become shorter.
        """
        content = self._read(begin, end)
        while len(content) < end - begin:  # rare: pread(2) returns early after a signal, and on some filesystems
            more = self._read(begin + len(content), end)
            if not more:
                raise LoadError("the file became shorter while it was sent: another process truncated it; load again")
            content += more
        return memoryview(content)

    def _read(self, begin: int, end: int) -> bytes:
        try:
            return os.pread(self._descriptor, end - begin, self._offset + begin)
        except OSError as error:
            raise LoadError(f"cannot read the file to send: {error.strerror}", errno=error.errno) from error
