"""Names on a mount of ``harness.fuse`` that are one though they are written differently (``Vices.folds_names``)."""

from __future__ import annotations

import dataclasses
import os
import unicodedata

from harness.fuse_nodes import Node, Nodes
from harness.fuse_wire import Op, Request

#: Their first name is in the directory that the request is about; of a rename, the second is in another.
_WITH_NAMES = frozenset({Op.LOOKUP, Op.MKNOD, Op.MKDIR, Op.SYMLINK, Op.LINK, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.CREATE})


def folded(request: Request, nodes: Nodes) -> Request:
    """Return a request with its names as the backing directory has them; new ones lose the dots at their end."""
    if request.op not in _WITH_NAMES:
        return request
    first, *others = request.names
    names = [_as_stored(nodes[request.node], first), *others]
    if request.op == Op.RENAME:
        names[1] = _as_stored(nodes[request.args[0]], others[0])
    return dataclasses.replace(request, data=memoryview(b"".join(name + b"\0" for name in names)))


def _as_stored(directory: Node, name: bytes) -> bytes:
    wanted = _key(name)
    stored = (found for found in os.listdir(os.fsencode(directory.path)) if _key(found) == wanted)
    return next(stored, name.rstrip(b".") or name)


def _key(name: bytes) -> str:
    text = os.fsdecode(name).casefold()
    return unicodedata.normalize("NFD", text).rstrip(".") or text
