"""torch's first format: a tar archive, written until 2017 (torch 0.1) and still in use at old URLs."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, cast

from rankload._formats.broken import BrokenFileError

_MEMBERS = frozenset({"sys_info", "pickle", "tensors", "storages"})
_MAX_MEMBERS = 16


def claims_to_be_tar(head: bytes) -> bool:
    """Return whether a file's first bytes are those of a POSIX tar archive."""
    return head[257:262] == b"ustar"


class _Bounded:
    """A file that limits each read to the bytes that exist: a header may claim any length, even a negative one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size_bytes = file, os.fstat(file.fileno()).st_size
        self.tell = file.tell

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise tarfile.ReadError("a member that begins before the archive")
        return self._file.seek(offset)

    def read(self, length: int) -> bytes:
        return self._file.read(max(0, min(length, self._size_bytes - self._file.tell())))


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members by their headers. A damaged archive may yield members forever.

    Raises:
        BrokenFileError: a header is damaged.
    """
    file.seek(0)  # tarfile starts at the current position
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Bounded(file)), mode="r:") as archive:
            yield from iter(archive.next, None)
    except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise BrokenFileError(f"damaged tar archive ({error})") from None


def is_legacy_tar(file: BinaryIO) -> bool:
    """Return whether the first member has a name that torch wrote."""
    try:
        first = next(_members(file), None)
    except BrokenFileError:
        return False
    return first is not None and first.name in _MEMBERS


def check_length(file: BinaryIO, size_bytes: int) -> None:
    """Check that all members and the end mark are present.

    Raises:
        BrokenFileError: the archive is truncated.
    """
    members = list(islice(_members(file), _MAX_MEMBERS))
    end = max((member.offset_data + member.size for member in members), default=0)
    # torch wrote with tarfile, which pads the last record: any truncation is visible
    is_whole = size_bytes % tarfile.RECORDSIZE == 0 and end + 2 * tarfile.BLOCKSIZE <= size_bytes
    missing = _MEMBERS - {member.name for member in members} - {"sys_info"}
    if missing or not is_whole:
        raise BrokenFileError(f"truncated checkpoint of torch's tar format ({size_bytes} bytes)")
    last_blocks = os.pread(file.fileno(), 2 * tarfile.BLOCKSIZE, size_bytes - 2 * tarfile.BLOCKSIZE)
    if any(last_blocks):
        raise BrokenFileError("truncated checkpoint of torch's tar format (no end mark)")
