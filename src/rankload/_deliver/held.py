"""A checkpoint's files, opened: what was looked at is what is loaded, whoever renames another file to their names."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rankload._cache.access import is_private_group, is_trusted, others_may_replace
from rankload._cache.failures import reading, reopening
from rankload._checkpoint.hints import hint_on_directory
from rankload._checkpoint.sharded import has_weight_map, part_names
from rankload._checkpoint.source import LocalSource
from rankload._deliver.failures import translated
from rankload._deliver.memory_file import folder_of


@dataclass(frozen=True)
class Held:
    """Where to load a checkpoint from.

    Attributes:
        path: the checkpoint's own, or one that leads to the open files.
        names: of its files, its own first.
        is_changeable: another user may write to one of them.
    """

    path: Path
    names: tuple[str, ...]
    is_changeable: bool


def hold(path: Path, sha256: str | None, closing: ExitStack) -> Held:
    """Open a checkpoint's files, and keep them open where another user could put others in their place. Not collective.

    Args:
        path: the checkpoint, or the index of one in several files.
        sha256: its digest where it has been verified.
        closing: closes them.

    Raises:
        CacheError: one of them cannot be read, or is no regular file.
        LoadError: the index is damaged.
    """
    with ExitStack() as opened:
        descriptors = _open_all(path, opened)
        statuses = [os.fstat(descriptor) for descriptor in descriptors.values()]
        is_changeable = any(_may_be_changed(status, is_verified=sha256 is not None) for status in statuses)
        held = path
        if is_changeable or any(others_may_replace(path.parent / name) for name in descriptors):
            held = folder_of(descriptors, closing) / path.name
            closing.push(opened.pop_all())
        return Held(held, tuple(descriptors), is_changeable)


def _open_all(path: Path, closing: ExitStack) -> dict[str, int]:
    descriptors = {path.name: _open(path, closing)}
    with translated(path):
        source = LocalSource(descriptors[path.name])
        names = part_names(source) if has_weight_map(source) else []
    for name in names:
        if name not in descriptors:
            descriptors[name] = _open(path.parent / name, closing)
    return descriptors


def _open(path: Path, closing: ExitStack) -> int:
    with reading(path):
        # a pipe in the file's place would wait for its writer, forever
        descriptor = reopening(lambda: os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        closing.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, f"it is no regular file{hint_on_directory(path)}", str(path))
    return descriptor


def _may_be_changed(status: os.stat_result, *, is_verified: bool) -> bool:
    """Return whether another user may write to a file.

    A group may be one's own, or colleagues whom one lets write to checkpoints; but then a digest promises nothing.
    """
    if not is_trusted(status.st_uid) or status.st_mode & stat.S_IWOTH:
        return True
    return is_verified and bool(status.st_mode & stat.S_IWGRP) and not is_private_group(status.st_gid)
