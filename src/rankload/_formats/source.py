"""Sources of a checkpoint's bytes: a local file, or ranges at an origin."""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import IO, Protocol

from rankload._formats.broken import BrokenFileError


class Source(Protocol):
    """Random access to the bytes of one file.

    Attributes:
        size_bytes: length of the file.
    """

    size_bytes: int

    def read(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from an offset on; fewer only at the end of the file."""


class LocalSource:
    """A source that reads an open file. The caller closes the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size

    def read(self, length: int, offset: int) -> bytes:
        """Read from the descriptor with pread(2), which returns at most 2 GiB."""
        return os.pread(self.descriptor, length, offset)


class FileObject:
    """A source that reads a file object from its current position on. Reading moves the position."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()
        self.size_bytes = file.seek(0, os.SEEK_END) - self._start

    def read(self, length: int, offset: int) -> bytes:
        """Seek, then read."""
        self._file.seek(self._start + offset)
        return self._file.read(length)


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading, unbuffered. A pipe in its place is refused; opening one could block forever.

    Raises:
        OSError: the path is no regular file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return io.FileIO(descriptor)


def read_exactly(source: Source, length: int, offset: int) -> bytes:
    """Return exactly ``length`` bytes from an offset on.

    Raises:
        BrokenFileError: the file does not have them. The check comes before any memory of that size is allocated.
    """
    if offset < 0 or offset + length > source.size_bytes:
        raise BrokenFileError(f"truncated file (no {length} bytes at byte {offset})")
    chunk = source.read(length, offset)
    if len(chunk) != length:
        raise BrokenFileError(f"truncated file (no {length} bytes at byte {offset})")
    return chunk
