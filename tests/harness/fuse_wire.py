"""The kernel's side of FUSE: requests and replies on /dev/fuse, as <linux/fuse.h> 7.36 lays them out.

Spoken directly, not through libfuse: that knows files by path, so that a file and the one renamed over it share one
page cache, and it cannot give up a blocked lock, so that a process killed while it waits for one does not die.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import struct
from dataclasses import dataclass
from typing import Any

from harness import mounts

MAX_WRITE_BYTES = 1 << 20
ROOT_ID = 1


class Op(enum.IntEnum):
    """Requests; what is missing here is answered with ENOSYS, for which the kernel has a fallback."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42
    FALLOCATE = 43


# The fixed parts of the requests that have one; names or data may follow.
ARGUMENTS = {
    Op.FORGET: struct.Struct("Q"),  # lookups
    Op.GETATTR: struct.Struct("I4xQ"),  # flags, handle
    # valid, handle, size, atime, mtime, their nanoseconds, mode, uid, gid
    Op.SETATTR: struct.Struct("I4xQQ8xQQ8xII4xI4xII4x"),
    Op.MKNOD: struct.Struct("II8x"),  # mode, rdev
    Op.MKDIR: struct.Struct("I4x"),  # mode
    Op.RENAME: struct.Struct("Q"),  # new parent
    Op.LINK: struct.Struct("Q"),  # node
    Op.OPEN: struct.Struct("I4x"),  # flags
    Op.READ: struct.Struct("QQI20x"),  # handle, offset, size
    Op.WRITE: struct.Struct("QQI20x"),  # handle, offset, size
    Op.RELEASE: struct.Struct("Q16x"),  # handle
    Op.FSYNC: struct.Struct("QI4x"),  # handle, 1 for fdatasync
    Op.FLUSH: struct.Struct("Q8xQ"),  # handle, lock owner
    Op.INIT: struct.Struct("IIII"),  # major, minor, readahead, flags
    Op.READDIR: struct.Struct("QQI20x"),  # handle, offset, size
    Op.RELEASEDIR: struct.Struct("Q16x"),  # handle
    Op.INTERRUPT: struct.Struct("Q"),  # the other request
    Op.CREATE: struct.Struct("II8x"),  # flags, mode
    Op.FALLOCATE: struct.Struct("QQQI4x"),  # handle, offset, length, mode
    Op.BATCH_FORGET: struct.Struct("I4x"),  # count
    # handle, owner, start, end (inclusive), type, lock flags
    **dict.fromkeys((Op.GETLK, Op.SETLK, Op.SETLKW), struct.Struct("QQQQI4xI4x")),
}

# SETATTR: which fields are meant
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_HANDLE, SET_ATIME_NOW, SET_MTIME_NOW = (
    1 << bit for bit in range(9)
)
GETATTR_HANDLE = 1
LOCK_IS_FLOCK = 1
OPEN_DIRECT_IO, OPEN_KEEP_CACHE = 1, 2

INIT_POSIX_LOCKS = 1 << 1
INIT_FLOCK_LOCKS = 1 << 10
_INIT_ALWAYS = (
    1 << 0  # asynchronous reads
    | 1 << 3  # O_TRUNC is part of the open
    | 1 << 5  # writes of more than a page
    | 1 << 12  # cached pages are dropped when mtime or size turn out to be others
    | 1 << 22  # MAX_PAGES
    | 1 << 30  # there is a second word of flags
)
_INIT2_DIRECT_IO_ALLOW_MMAP = 1 << 4

_HEADER = struct.Struct("IIQQIII4x")  # length, opcode, id, node, uid, gid, thread
_REPLY = struct.Struct("IiQ")  # length, -errno, id
_ATTRIBUTES = struct.Struct("QQQQQQIIIIIIIIII")
_FORGET_ONE = struct.Struct("QQ")
_DIRENT = struct.Struct("QQII")


@dataclass(frozen=True)
class Request:
    """One request of the kernel.

    Attributes:
        args: The fixed part, unpacked as ``ARGUMENTS`` says.
        data: What follows it. Valid until the next request is read.
    """

    op: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    args: tuple[Any, ...]
    data: memoryview

    @property
    def names(self) -> list[bytes]:
        """The zero-terminated names of the data."""
        return bytes(self.data).split(b"\0")[:-1]


class Connection:
    """A mount, and the channel on which the kernel asks for what happens there."""

    def __init__(self, mountpoint: str) -> None:
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._buffer = memoryview(bytearray(MAX_WRITE_BYTES + 4096))
        self._poll = select.poll()
        self._poll.register(self._device, select.POLLIN)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        mounts.mount("faulty", mountpoint, "fuse.faulty", mounts.MS_NOSUID | mounts.MS_NODEV, options)

    def receive(self, timeout_seconds: float | None) -> Request | None:
        """The next request; ``None`` when none came within the time.

        Raises:
            OSError: ENODEV, once it is unmounted.
        """
        if timeout_seconds is not None and not self._poll.poll(timeout_seconds * 1000):
            return None
        try:
            length = os.readv(self._device, [self._buffer])
        except (FileNotFoundError, InterruptedError):  # the one who asked was killed meanwhile
            return None
        _, op, unique, node, uid, gid, pid = _HEADER.unpack_from(self._buffer)
        layout = ARGUMENTS.get(op)  # type: ignore[call-overload]
        args = layout.unpack_from(self._buffer, _HEADER.size) if layout else ()
        start = _HEADER.size + (layout.size if layout else 0)
        return Request(op, unique, node, uid, gid, pid, args, self._buffer[start:length])

    def reply(self, request: Request, payload: bytes) -> None:
        self._send(request, 0, payload)

    def fail(self, request: Request, code: int) -> None:
        self._send(request, -code, b"")

    def _send(self, request: Request, error: int, payload: bytes) -> None:
        header = _REPLY.pack(_REPLY.size + len(payload), error, request.unique)
        with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
            os.writev(self._device, [header, payload])


def init_reply(readahead: int, flags: int, *, allows_mmap: bool) -> bytes:
    """The reply to INIT. Without ``allows_mmap`` a file opened with OPEN_DIRECT_IO cannot be mapped shared."""
    flags2 = _INIT2_DIRECT_IO_ALLOW_MMAP if allows_mmap else 0
    words = (7, 36, readahead, _INIT_ALWAYS | flags, 0, 0, MAX_WRITE_BYTES, 1, MAX_WRITE_BYTES // 4096, 0, flags2)
    return struct.pack("IIIIHHIIHHI28x", *words)


def attributes(status: os.stat_result) -> bytes:
    times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
    return _ATTRIBUTES.pack(
        status.st_ino,
        status.st_size,
        status.st_blocks,
        *(time // 10**9 for time in times),
        *(time % 10**9 for time in times),
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_rdev,
        status.st_blksize,
        0,
    )


def attributes_reply(status: os.stat_result, valid_seconds: float) -> bytes:
    seconds, nanoseconds = _timespec(valid_seconds)
    return struct.pack("QI4x", seconds, nanoseconds) + attributes(status)


def entry_reply(node: int, status: os.stat_result, valid_seconds: float, attributes_valid_seconds: float) -> bytes:
    entry, attribute = _timespec(valid_seconds), _timespec(attributes_valid_seconds)
    return struct.pack("QQQQII", node, 0, entry[0], attribute[0], entry[1], attribute[1]) + attributes(status)


def negative_reply(valid_seconds: float) -> bytes:
    """There is no such name, and the kernel need not ask again for so long."""
    seconds, nanoseconds = _timespec(valid_seconds)
    return struct.pack("QQQQII", 0, 0, seconds, 0, nanoseconds, 0) + bytes(_ATTRIBUTES.size)


def open_reply(handle: int, flags: int = 0) -> bytes:
    return struct.pack("QI4x", handle, flags)


def write_reply(size: int) -> bytes:
    return struct.pack("I4x", size)


def statfs_reply(status: os.statvfs_result, free_bytes: int | None = None) -> bytes:
    """statfs(2), with at most ``free_bytes`` free."""
    free, available = status.f_bfree, status.f_bavail
    if free_bytes is not None:
        blocks = free_bytes // status.f_frsize
        free, available = min(free, blocks), min(available, blocks)
    counts = (status.f_blocks, free, available, status.f_files, status.f_ffree)
    return struct.pack("QQQQQIII28x", *counts, status.f_bsize, status.f_namemax, status.f_frsize)


def dirent(inode: int, offset: int, kind: int, name: bytes) -> bytes:
    """One name of a directory; ``kind`` is its file type as st_mode has it."""
    entry = _DIRENT.pack(inode, offset, len(name), kind >> 12) + name
    return entry + bytes(-len(entry) % 8)


def forgotten(request: Request) -> list[tuple[int, int]]:
    """(node, lookups) of a FORGET or BATCH_FORGET."""
    if request.op == Op.FORGET:
        return [(request.node, request.args[0])]
    size = request.args[0] * _FORGET_ONE.size
    return list(_FORGET_ONE.iter_unpack(request.data[:size]))


def _timespec(seconds: float) -> tuple[int, int]:
    return divmod(round(seconds * 10**9), 10**9)
