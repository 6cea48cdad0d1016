"""Files of other users: copied into memory that their owners cannot change, and verified there."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

from rankload._cache.access import name_of
from rankload._cache.failures import reading
from rankload._deliver.held import hold
from rankload._deliver.memory_file import folder_of, writable
from rankload._deliver.node_memory import NodeMemory
from rankload._deliver.parts import parts_of
from rankload._errors import DigestMismatchError, LoadError, printable
from rankload._types import Channel, Progress

_READ_BYTES = 8 << 20


def with_own_copy(path: Path, sha256: str | None, channel: Channel, closing: ExitStack) -> Path:
    """Return where to load a checkpoint from: its path, or one that leads to files which nobody else can exchange.

    Whoever owns a file may change it after it was verified, also under a mapping. So what another user may write to is
    copied: by one rank of a node into memory that the others open, and it hashes what it copies. If it fails, they
    raise its error. What another user may only put another file in the place of is kept open.

    Args:
        path: the checkpoint, or the index of one in several files.
        sha256: its digest where it has been verified, 64 hex digits; the parts of an index have none.
        channel: of the call. Every rank of a node that loads from this path calls this.
        closing: lets go of the memory and the files. What is mapped stays.

    Raises:
        DigestMismatchError: the file is no longer the one that was verified.
        LoadError: its owner has changed it meanwhile.
        RankloadError: what made the copying rank fail.
    """
    held = hold(path, sha256, closing)
    if not held.is_changeable:
        return held.path
    with reading(path), ExitStack() as opened:
        files = {name: opened.enter_context((held.path.parent / name).open("rb", buffering=0)) for name in held.names}
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
        memory = NodeMemory.claim(sizes, channel, closing, purpose="own copy")
        if memory.is_received_here:
            done_bytes = 0
            for name, file in files.items():
                expected = sha256 if name == path.name else None
                _copy(file.fileno(), memory.descriptors[name], path.parent / name, sizes[name], expected)
                done_bytes += sizes[name]
                channel.report(Progress("loading", done_bytes))
    memory.tell_or_wait(channel)
    copied = folder_of(memory.descriptors, closing) / path.name
    if {path.name, *parts_of(copied)} != set(memory.descriptors):
        raise LoadError(f"{printable(str(path))}: its owner has changed it while it was loaded", path=str(path))
    return copied


def _copy(source: int, target: int, path: Path, size_bytes: int, sha256: str | None) -> None:
    digest, offset = hashlib.sha256(), 0
    while offset < size_bytes:
        with writable(target, offset, min(offset + _READ_BYTES, size_bytes)) as part:
            count = os.preadv(source, [part], offset)
            if sha256 is not None:
                digest.update(part[:count])
        if not count:
            raise LoadError(f"{printable(str(path))}: its owner has cut it off while it was loaded", path=str(path))
        offset += count
    if sha256 is not None and digest.hexdigest() != sha256:
        owner = name_of(os.fstat(source).st_uid)
        raise DigestMismatchError(
            f'invalid hash value (expected "{sha256}", got "{digest.hexdigest()}"): {printable(str(path))} belongs to '
            f"{owner}, who has changed it since it was verified",
            expected=sha256,
            got=digest.hexdigest(),
            path=str(path),
        )
