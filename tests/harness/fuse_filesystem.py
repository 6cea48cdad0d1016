"""The process behind a mount of ``harness.fuse``: a passthrough to a backing directory, with vices.

    python -m harness.fuse_filesystem BACKING MOUNTPOINT VICES_AS_JSON

Prints a line when it is mounted; ends when it is unmounted. Needs nothing but root and /dev/fuse. One thread does
everything, one request after the other.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import traceback

from harness import fuse_wire as wire
from harness.fuse_files import Files
from harness.fuse_folding import folded
from harness.fuse_locks import RETRY_SECONDS
from harness.fuse_names import Names
from harness.fuse_nodes import Nodes
from harness.fuse_vices import Vices
from harness.fuse_wire import Connection, Op, Request


class Filesystem:
    """Hands each request to the method of its name, in ``Names``, in ``Files`` or here.

    These return the payload of the reply (``None``: it comes later) or raise OSError.
    """

    def __init__(self, backing: str, vices: Vices) -> None:
        self._vices = vices
        self._refusals = vices.refusals()
        self._nodes = Nodes(backing)
        names = Names(self._nodes, vices)
        self._files = Files(backing, self._nodes, names, vices)
        handlers = (self, names, self._files)
        self._answers = {
            op: getattr(handler, op.name.lower())
            for op in Op
            for handler in handlers
            if hasattr(handler, op.name.lower())
        }

    def serve(self, connection: Connection) -> None:
        """Answers until it is unmounted."""
        locks = self._files.locks
        while True:
            try:
                request = connection.receive(RETRY_SECONDS if locks.has_blocked else None)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            locks.retry(connection)
            if request is None:
                continue
            if request.op == Op.INTERRUPT:
                locks.interrupt(connection, request.args[0])
            elif request.op in (Op.FORGET, Op.BATCH_FORGET):
                for number, lookups in wire.forgotten(request):
                    self._nodes.forget(number, lookups)
            else:
                self._answer(connection, request)

    def _answer(self, connection: Connection, request: Request) -> None:
        code = self._refusals.get(request.op)
        if code is None and request.op not in self._answers:
            code = errno.ENOSYS
        try:
            if self._vices.folds_names:
                request = folded(request, self._nodes)
            payload = None if code else self._answers[request.op](request)
        except OSError as error:
            code = error.errno or errno.EIO
        except Exception:
            traceback.print_exc()  # the harness fails the test on it
            code = errno.EIO
        if code:
            connection.fail(request, code)
        elif payload is not None:
            connection.reply(request, payload)

    def init(self, request: Request) -> bytes:
        _, _, readahead, _ = request.args
        # Without these flags the kernel keeps the locks of the mount itself.
        flags = 0 if self._vices.locks == "local" else wire.INIT_POSIX_LOCKS | wire.INIT_FLOCK_LOCKS
        return wire.init_reply(readahead, flags, allows_mmap=not self._vices.direct_io)

    def statfs(self, request: Request) -> bytes:
        is_shown = self._vices.quota_errno == "ENOSPC" and self._vices.quota_bytes is not None
        return wire.statfs_reply(os.statvfs(self._nodes[request.node].path), self._files.room() if is_shown else None)


def main() -> None:
    backing, mountpoint, vices = sys.argv[1:]
    os.umask(0)  # the callers' has been applied already
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # one for every file that the kernel remembers
    filesystem = Filesystem(backing, Vices(**json.loads(vices)))
    connection = Connection(mountpoint)
    print("mounted", flush=True)
    filesystem.serve(connection)


if __name__ == "__main__":
    main()
