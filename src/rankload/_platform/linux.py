"""Linux system calls that Python lacks; no-ops on other systems and on filesystems without support."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
from pathlib import Path

#: Allocate blocks, but keep the file's length: fallocate(2).
_FALLOC_FL_KEEP_SIZE = 1

#: Constants of fcntl.h, statx(2) and rename(2).
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 0x100, 0x800, 1, 2

#: Start writing the dirty pages of a range; do not wait: sync_file_range(2).
_SYNC_FILE_RANGE_WRITE = 2

#: Filesystems on a disk of this machine, or in its memory: f_type of statfs(2), from linux/magic.h and the filesystems'
#: own sources. statfs(2) does not show what lies below an overlay; in containers that is a local disk.
_LOCAL = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0x01021994,  # tmpfs
        0x794C7630,  # overlayfs
        0x2FC12FC1,  # ZFS
        0xF2F52010,  # F2FS
        0xCA451A4E,  # bcachefs
        0x858458F6,  # ramfs
        0x958458F6,  # hugetlbfs
        0x73717368,  # SquashFS
        0xE0F5E1E2,  # EROFS
        0x3153464A,  # JFS
        0x52654973,  # ReiserFS
    }
)


#: Map each byte of mincore(2) to its lowest bit: the other bits are undefined.
_LOWEST_BIT = bytes(value & 1 for value in range(256))


def allocate(descriptor: int, begin: int, end: int) -> None:
    """Allocate the blocks of a range of a file, so that a full disk is noticed before the bytes arrive.

    Not posix_fallocate(3): without support of the filesystem, that writes into every block.

    Raises:
        OSError: ENOSPC or EDQUOT. All other errors are ignored: writing may still work.
    """
    if _fallocate is None or begin >= end:
        return
    while _fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, begin, end - begin):
        error = ctypes.get_errno()
        if error in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error, os.strerror(error))
        if error != errno.EINTR:
            return


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Let the kernel start writing a range to disk, so that little is left for the final fsync."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)  # a failure costs only time


def is_on_local_disk(descriptor: int) -> bool:
    """Return whether a file's filesystem is known to be local to this machine."""
    status = (ctypes.c_long * 32)()  # struct statfs has 120 bytes; f_type is its first long
    return _fstatfs is not None and _fstatfs(descriptor, status) == 0 and status[0] in _LOCAL


def resident_pages(descriptor: int, size_bytes: int) -> bytes | None:
    """Return one byte per page of a file: 1 if the page is in memory, 0 if not. Return None if the kernel cannot tell.

    Linux reports all pages as resident for a file that this user neither owns nor may write to (mincore(2)).
    """
    if _mincore is None or not size_bytes:
        return None
    try:
        mapping = mmap.mmap(descriptor, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError:  # the filesystem does not support mappings
        return None
    with mapping:
        pages = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
        first = (ctypes.c_char * size_bytes).from_buffer(mapping)  # prevents closing the mapping until it is deleted
        failed = _mincore(ctypes.addressof(first), size_bytes, pages)
        del first
        return None if failed else bytes(pages).translate(_LOWEST_BIT)


def birth_ns(path: Path) -> int | None:
    """Return a file's creation time, in nanoseconds since the epoch; None if the filesystem does not store it.

    Filesystems reuse the inode numbers of removed files. Inode number and creation time together identify a file
    (statx(2)).
    """
    found = ctypes.create_string_buffer(256)  # struct statx
    if _statx is None or _statx(_AT_FDCWD, os.fsencode(path), _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, found):
        return None
    (mask,) = struct.unpack_from("I", found, 0)
    seconds, nanoseconds = struct.unpack_from("qI", found, 80)
    return seconds * 10**9 + nanoseconds if mask & _STATX_BTIME else None


def rename_if_absent(path: Path, target: Path) -> None:
    """Rename a file, unless the new name is taken.

    Without RENAME_NOREPLACE, make a hard link and remove the old name. Without hard links, check that the new name is
    free, then rename; this last way is not atomic.

    Raises:
        FileExistsError: the new name is taken.
        OSError: the file cannot be renamed.
    """
    names = os.fsencode(path), os.fsencode(target)
    if _renameat2 is None or _renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
        error = ctypes.get_errno() if _renameat2 is not None else errno.ENOSYS
        if error not in (errno.EINVAL, errno.ENOSYS):  # NFS and some FUSE filesystems support only plain renames
            raise OSError(error, os.strerror(error), str(target))
        _link_if_absent(path, target)


def exchange(path: Path, other: Path) -> bool:
    """Exchange two names atomically; return False where that is not possible."""
    names = os.fsencode(path), os.fsencode(other)
    return _renameat2 is not None and not _renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)


def _link_if_absent(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        if not os.path.lexists(target):
            path.replace(target)
            return
        # an NFS client may send a request twice and see only the second answer: EEXIST for its own link
        if error.errno != errno.EEXIST or not os.path.samestat(path.lstat(), target.lstat()):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
    path.unlink()


def _find(name: str, *argument_types: type[ctypes._CData]) -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = [*argument_types]
        function.restype = ctypes.c_int
    return function


# off_t is 64 bits wide in these on every 64-bit Linux
_fallocate = _find("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _find("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_mincore = _find("mincore", ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_ubyte))
_statx = _find("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
_renameat2 = _find("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_fstatfs = _find("fstatfs", ctypes.c_int, ctypes.c_long * 32)
