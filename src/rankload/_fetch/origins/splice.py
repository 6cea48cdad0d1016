"""splice(2): bytes out of a socket into a pipe, within the kernel."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
from collections.abc import Iterator

#: A kernel that does not have it, or not for this kind of socket.
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def can_splice() -> bool:
    """Tell whether this system has splice(2): Linux."""
    return hasattr(os, "splice")


@contextlib.contextmanager
def new_pipe(size_bytes: int) -> Iterator[tuple[int, int]]:
    """Make a pipe, with room for so much if this user may have it; yields the end to read from and the one to write to.

    Raises:
        OSError: no descriptor is left.
    """
    out_of, into = os.pipe()
    try:
        with contextlib.suppress(OSError):  # more than fs.pipe-user-pages-soft, see pipe(7)
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, size_bytes)
        yield out_of, into
    finally:
        os.close(out_of)
        os.close(into)


def splice_from(connection: socket.socket, pipe: int, count: int) -> int | None:
    """Move bytes, as many as there are, at most so many; waits for the first as long as the socket's timeout says.

    Returns:
        How many; 0 when no more will come; None where the kernel cannot do it.

    Raises:
        TimeoutError: nothing came.
        OSError: the connection broke.
    """
    while True:
        try:
            return os.splice(connection.fileno(), pipe, count)
        except BlockingIOError:  # a socket with a timeout is one that does not block
            pass
        except OSError as error:
            if error.errno in _CANNOT:
                return None
            raise
        # not in the handler: the TimeoutError's context would be the BlockingIOError, and be taken for its cause
        _wait(connection)


def _wait(connection: socket.socket) -> None:
    poll, timeout = select.poll(), connection.gettimeout()
    poll.register(connection, select.POLLIN)
    if not poll.poll(None if timeout is None else timeout * 1000):
        raise TimeoutError("timed out")
