"""Contents and attributes of files on a mount of ``harness.fuse``."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import sys
import time

from harness import fuse_wire as wire
from harness.fuse_locks import Locks
from harness.fuse_names import Names
from harness.fuse_nodes import Node, Nodes, OpenFile, used_bytes
from harness.fuse_vices import Vices
from harness.fuse_wire import Request

_libc = ctypes.CDLL(None, use_errno=True)


class Files:
    """Answers the requests about files; each method is named as its request, see ``fuse_filesystem``."""

    def __init__(self, backing: str, nodes: Nodes, names: Names, vices: Vices) -> None:
        self.locks = Locks()
        self._backing = backing
        self._nodes = nodes
        self._names = names
        self._vices = vices
        self._numbers = itertools.count(1)
        self._files: dict[int, OpenFile] = {}
        self._stale_reads = vices.stale_reads
        self._stale_opens = 2 * vices.stale_opens  # the kernel tries each open() a second time by itself

    # --- open files ---------------------------------------------------------------------------------------------

    def open(self, request: Request) -> bytes:
        if self._stale_opens:
            self._stale_opens -= 1
            raise _stale()
        node, [flags] = self._node(request), request.args
        return self._opened(node, os.open(node.path, flags & (os.O_ACCMODE | os.O_TRUNC)))

    def create(self, request: Request) -> bytes:
        parent, [name], (flags, mode) = self._nodes[request.node], request.names, request.args
        how = flags & (os.O_ACCMODE | os.O_TRUNC | os.O_EXCL) | os.O_CREAT | os.O_NOFOLLOW
        try:
            descriptor = os.open(name, how | os.O_EXCL, mode, dir_fd=parent.descriptor)
        except FileExistsError:  # made by another mount, since the kernel has asked or within the lag
            descriptor = os.open(name, how, mode, dir_fd=parent.descriptor)
        else:
            os.chown(descriptor, request.uid, request.gid)
        number, node = self._nodes.find_open(descriptor)
        self._names.see(parent, name)
        return self._names.entry(number, node) + self._opened(node, descriptor)

    def _opened(self, node: Node, descriptor: int) -> bytes:
        number = next(self._numbers)
        self._files[number] = OpenFile(descriptor, node)
        # Without a page cache each read() is one request, so that as many can fail as the test has said.
        is_direct = self._vices.direct_io or self._stale_reads > 0
        keeps = wire.OPEN_KEEP_CACHE if self._vices.keeps_pages else 0
        return wire.open_reply(number, wire.OPEN_DIRECT_IO if is_direct else keeps)

    def flush(self, request: Request) -> bytes:
        number, owner = request.args
        self.locks.drop(request.node, owner)
        self._write_back(self._files[number])
        return b""

    def release(self, request: Request) -> bytes:
        os.close(self._files.pop(request.args[0]).descriptor)
        return b""

    def fsync(self, request: Request) -> bytes:
        number, is_data_only = request.args
        file = self._file(number)
        self._write_back(file)
        (os.fdatasync if is_data_only else os.fsync)(file.descriptor)
        return b""

    # --- contents -------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> bytes:
        number, offset, size = request.args
        if self._stale_reads:
            self._stale_reads -= 1
            raise _stale()
        content = os.pread(self._file(number).descriptor, size, offset)
        if self._vices.reads_log is not None:
            with open(self._vices.reads_log, "a") as log:
                log.write(f"{request.pid} {len(content)}\n")
        return content

    def write(self, request: Request) -> bytes:
        number, offset, size = request.args
        file = self._file(number)
        fitting = size if self._vices.quota_at == "close" else self._fitting(file, offset, size)
        file.is_dirty = True
        return wire.write_reply(os.pwrite(file.descriptor, request.data[:fitting], offset))

    def fallocate(self, request: Request) -> bytes:
        number, offset, length, mode = request.args
        file = self._file(number)
        if self._fitting(file, offset, length) < length:
            raise self._beyond_quota()
        if _libc.fallocate(file.descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length)) == -1:
            raise OSError(ctypes.get_errno(), "fallocate")
        return b""

    # --- the quota ------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many bytes the quota leaves; negative when it is exceeded."""
        if self._vices.quota_bytes is None:
            return sys.maxsize
        return self._vices.quota_bytes - used_bytes(self._backing)

    def _fitting(self, file: OpenFile, offset: int, size: int) -> int:
        """How many of ``size`` bytes at ``offset`` the quota lets through: at least one."""
        growth = offset + size - os.fstat(file.descriptor).st_size
        if self._vices.quota_bytes is None or growth <= 0:
            return size
        fitting = size - max(0, growth - self.room())
        if fitting <= 0:
            raise self._beyond_quota()
        return fitting

    def _write_back(self, file: OpenFile) -> None:
        """Hands over what was written, as far as the quota allows; the rest is lost. Tells each loss once."""
        was_dirty, file.is_dirty = file.is_dirty, False
        if was_dirty and self._vices.quota_at == "close" and (room := self.room()) < 0:
            size = os.fstat(file.descriptor).st_size
            os.truncate(file.descriptor, max(0, size + room))
            raise self._beyond_quota()

    def _beyond_quota(self) -> OSError:
        return OSError(getattr(errno, self._vices.quota_errno), "beyond the quota")

    # --- attributes -------------------------------------------------------------------------------------------------

    def getattr(self, request: Request) -> bytes:
        flags, number = request.args
        status = self._file(number).node.status() if flags & wire.GETATTR_HANDLE else self._node(request).status()
        return wire.attributes_reply(status, self._vices.attribute_seconds)

    def setattr(self, request: Request) -> bytes:
        valid, number, size, atime, mtime, atime_ns, mtime_ns, mode, uid, gid = request.args
        node = self._node(request)
        if valid & wire.SET_MODE:
            os.chmod(node.path, mode)
        if valid & (wire.SET_UID | wire.SET_GID):
            os.chown(node.path, uid if valid & wire.SET_UID else -1, gid if valid & wire.SET_GID else -1)
        if valid & wire.SET_SIZE:
            os.truncate(self._file(number).descriptor if valid & wire.SET_HANDLE else node.path, size)
        if valid & (wire.SET_ATIME | wire.SET_MTIME):
            before, now = node.status(), time.time_ns()
            new_atime = now if valid & wire.SET_ATIME_NOW else atime * 10**9 + atime_ns
            new_mtime = now if valid & wire.SET_MTIME_NOW else mtime * 10**9 + mtime_ns
            times = (
                new_atime if valid & wire.SET_ATIME else before.st_atime_ns,
                new_mtime if valid & wire.SET_MTIME else before.st_mtime_ns,
            )
            os.utime(node.path, ns=times)
        return wire.attributes_reply(node.status(), self._vices.attribute_seconds)

    # --- locks --------------------------------------------------------------------------------------------------------

    def setlkw(self, request: Request) -> bytes | None:
        file = self._file(request.args[0])
        if self._vices.locks == "hang":
            return self.locks.hang(request)
        return self.locks.perform(request, file.node.path, file.descriptor)

    getlk = setlk = setlkw

    # --- removed elsewhere -------------------------------------------------------------------------------------------

    def _node(self, request: Request) -> Node:
        return self._checked(self._nodes[request.node])

    def _file(self, number: int) -> OpenFile:
        file = self._files[number]
        self._checked(file.node)
        return file

    def _checked(self, node: Node) -> Node:
        if self._vices.stale_when_removed and self._nodes.is_removed_elsewhere(node):
            raise _stale()
        return node


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))
