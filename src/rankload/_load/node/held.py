"""A checkpoint's files, held open: what was verified is what is loaded, whatever is renamed meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rankload._cache.access import is_private_group, is_trusted, others_may_replace
from rankload._cache.files import retry_if_stale, wrap_read_errors
from rankload._formats.hints import hint_on_directory
from rankload._formats.sharded import has_weight_map, part_names
from rankload._formats.source import LocalSource
from rankload._load.node.memory_file import folder_of
from rankload._load.values.torch_errors import wrap_load_errors
from rankload._platform.linux import is_on_local_disk
from rankload._text import printable
from rankload._types import FileIdentity
from rankload.errors import LoadError


@dataclass(frozen=True)
class Held:
    """Where to load a checkpoint from.

    Attributes:
        path: the checkpoint's own, or one that leads to the open files.
        descriptors: of its files by name, its own first.
        identities: of these when they were opened, by name.
        is_changeable: another user may write to one of them.
    """

    path: Path
    descriptors: dict[str, int]
    identities: dict[str, FileIdentity]
    is_changeable: bool

    def loaded_by_name(self, stack: ExitStack) -> Path:
        """Return the path to load from; ``stack`` checks that it has led to the open files all the while.

        Another job of this user may publish another version meanwhile, and a local file may be rewritten.
        """
        stack.push(self._check_unless_failed)
        return self.path

    def _check_unless_failed(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            for name, opened in self.identities.items():
                path = self.path.parent / name
                with (
                    wrap_read_errors(path),
                    suppress(FileNotFoundError),
                ):  # whoever removed it has not changed what is open
                    _check_identity(path, FileIdentity.of(path.stat()), opened, self.descriptors[name])


def hold(path: Path, sha256: str | None, stack: ExitStack, identity: FileIdentity | None = None) -> Held:
    """Open a checkpoint's files. Not collective.

    The path leads to what is open where another user could put other files in their place.

    Args:
        path: the checkpoint, or the index of one in several files.
        sha256: its digest where it has been verified.
        stack: closes them.
        identity: of the file that was verified.

    Raises:
        CacheError: one of them cannot be read, or is no regular file.
        LoadError: the index is damaged, or another file is there than was verified.
    """
    descriptors = _open_all(path, stack)
    statuses = {name: os.fstat(descriptor) for name, descriptor in descriptors.items()}
    identities = {name: FileIdentity.of(status) for name, status in statuses.items()}
    if identity is not None:
        _check_identity(path, identities[path.name], identity, descriptors[path.name])
    is_changeable = any(_may_be_changed(status, is_verified=sha256 is not None) for status in statuses.values())
    if is_changeable or any(others_may_replace(path.parent / name) for name in descriptors):
        path = folder_of(descriptors, stack) / path.name
    return Held(path, descriptors, identities, is_changeable)


def _check_identity(path: Path, found: FileIdentity, expected: FileIdentity, descriptor: int) -> None:
    if not found.is_same(expected, is_exact=is_on_local_disk(descriptor)):
        display_name = printable(str(path))
        raise LoadError(
            f"{display_name}: it was replaced or rewritten while it was loaded; load it again", path=str(path)
        )


def _open_all(path: Path, stack: ExitStack) -> dict[str, int]:
    descriptors = {path.name: _open(path, stack)}
    with wrap_load_errors(path):
        source = LocalSource(descriptors[path.name])
        names = part_names(source) if has_weight_map(source) else []
    for name in names:
        if name not in descriptors:
            descriptors[name] = _open(path.parent / name, stack)
    return descriptors


def _open(path: Path, stack: ExitStack) -> int:
    with wrap_read_errors(path):
        # a pipe in the file's place would wait for its writer, forever
        descriptor = retry_if_stale(lambda: os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        stack.callback(os.close, descriptor)
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
