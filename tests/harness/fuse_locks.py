"""Locks of a mount that are locks on the backing files, so that they exclude across mounts."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable

from harness.fuse_wire import LOCK_IS_FLOCK, Connection, Op, Request

RETRY_SECONDS = 0.005

_FLOCK = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}
_STRUCT_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length (0: to the end of all files), pid
_REPLY = struct.Struct("QQII")  # start, end, type, pid
_LAST_BYTE = (1 << 63) - 1


class Locks:
    """Takes, waits for and drops locks.

    A blocked call is tried again and again, not waited for: one thread serves the whole mount, and a call whose
    process gets a signal has to come back.
    """

    def __init__(self) -> None:
        # fcntl locks belong to a process, which for the backing file would be ours. So each of its owners gets an open
        # file of its own, to which open-file-description locks belong.
        self._owners: dict[tuple[int, int], int] = {}
        self._blocked: dict[int, tuple[Request, Callable[[], bytes]]] = {}

    @property
    def has_blocked(self) -> bool:
        return bool(self._blocked)

    def perform(self, request: Request, path: str, descriptor: int) -> bytes | None:
        """Performs GETLK, SETLK or SETLKW.

        Args:
            path: Of the file in the backing directory.
            descriptor: Of the open file of the caller.

        Returns:
            The reply; ``None`` if the call has to wait.
        """
        _, owner, start, end, kind, flags = request.args
        if flags & LOCK_IS_FLOCK:
            attempt = lambda: _flock(descriptor, kind)  # noqa: E731 - the two branches make one thing
        else:
            key = (request.node, owner)
            if key not in self._owners:
                self._owners[key] = os.open(path, os.O_RDWR)
            command = fcntl.F_OFD_GETLK if request.op == Op.GETLK else fcntl.F_OFD_SETLK
            attempt = lambda: _record_lock(self._owners[key], command, kind, start, end)  # noqa: E731
        try:
            return attempt()
        except BlockingIOError:
            if request.op != Op.SETLKW:
                raise
            self._blocked[request.unique] = (request, attempt)
            return None

    def hang(self, request: Request) -> None:
        """Lets GETLK, SETLK or SETLKW wait for ever."""
        self._blocked[request.unique] = (request, _wait_on)

    def retry(self, connection: Connection) -> None:
        """Tries all blocked calls again, the oldest first."""
        for unique, (request, attempt) in list(self._blocked.items()):
            try:
                payload = attempt()
            except BlockingIOError:
                continue
            except OSError as error:
                connection.fail(request, error.errno or errno.EIO)
            else:
                connection.reply(request, payload)
            del self._blocked[unique]

    def interrupt(self, connection: Connection, unique: int) -> None:
        """Ends a blocked call whose process has got a signal."""
        if blocked := self._blocked.pop(unique, None):
            connection.fail(blocked[0], errno.EINTR)

    def drop(self, node: int, owner: int) -> None:
        """Drops the fcntl locks of an owner, who has closed the file."""
        if (descriptor := self._owners.pop((node, owner), None)) is not None:
            os.close(descriptor)


def _wait_on() -> bytes:
    raise BlockingIOError


def _flock(descriptor: int, kind: int) -> bytes:
    fcntl.flock(descriptor, _FLOCK[kind] | fcntl.LOCK_NB)
    return b""


def _record_lock(descriptor: int, command: int, kind: int, start: int, end: int) -> bytes:
    length = 0 if end == _LAST_BYTE else end - start + 1
    answer = fcntl.fcntl(descriptor, command, _STRUCT_FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    if command == fcntl.F_OFD_SETLK:
        return b""
    kind, _, start, length, _ = _STRUCT_FLOCK.unpack(answer)
    return _REPLY.pack(start, start + length - 1 if length else _LAST_BYTE, kind, 0)
