"""Hold a checkpoint's files open, so that the verified files are loaded even if others get their names meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rankload._cache.access import has_access_list, is_private_group, is_trusted, others_may_replace
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
    """A checkpoint whose files are open.

    Attributes:
        path: path of the checkpoint, or a path that leads to the open files.
        descriptors: descriptors of the files, by name; the checkpoint or its index comes first.
        identities: identities of the files when they were opened, by name.
        is_changeable: whether another user may write to one of the files.
    """

    path: Path
    descriptors: dict[str, int]
    identities: dict[str, FileIdentity]
    is_changeable: bool

    def loaded_by_name(self, stack: ExitStack) -> Path:
        """Return the path to load from. When ``stack`` closes, it checks that the path still leads to the open files.

        Another job of this user may publish another version meanwhile, or a program may rewrite a local file.
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
                ):  # removing a file does not change the open one
                    _check_identity(path, FileIdentity.of(path.stat()), opened, self.descriptors[name])


def hold(path: Path, sha256: str | None, stack: ExitStack, identity: FileIdentity | None = None) -> Held:
    """Open a checkpoint's files. Not collective.

    If another user could replace or change the files, the result's path leads to the open files.

    Args:
        path: path of the checkpoint, or of the index of a checkpoint in several files.
        sha256: verified digest; None if the checkpoint was not verified.
        stack: closes the files.
        identity: identity of the verified file; None to skip the comparison.

    Raises:
        CacheError: a file cannot be read, or is no regular file.
        LoadError: the index is damaged, or the file is not the verified one.
    """
    descriptors = _open_all(path, stack)
    identities = {name: FileIdentity.of(os.fstat(descriptor)) for name, descriptor in descriptors.items()}
    if identity is not None:
        _check_identity(path, identities[path.name], identity, descriptors[path.name])
    is_changeable = any(_may_be_changed(one, is_verified=sha256 is not None) for one in descriptors.values())
    if is_changeable or any(others_may_replace(path.parent / name) for name in descriptors):
        path = folder_of(descriptors, stack) / path.name
    return Held(path, descriptors, identities, is_changeable)


def _check_identity(path: Path, found: FileIdentity, expected: FileIdentity, descriptor: int) -> None:
    if not found.is_same(expected, is_exact=is_on_local_disk(descriptor)):
        display_name = printable(str(path))
        raise LoadError(
            f"{display_name}: the file was replaced or rewritten while it was loaded; load it again", path=str(path)
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
        # O_NONBLOCK: opening a pipe in the file's place would wait for a writer forever
        descriptor = retry_if_stale(lambda: os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        stack.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, f"it is no regular file{hint_on_directory(path)}", str(path))
    return descriptor


def _may_be_changed(descriptor: int, *, is_verified: bool) -> bool:
    """Return whether another user may write to an open file.

    A group-writable file is accepted if no digest was verified: users may let colleagues write to checkpoints. With a
    verified digest, the group must be private, or the digest would prove nothing. Where a file has an access control
    list, the group's bits are the most that any user or group in the list may do.
    """
    status = os.fstat(descriptor)
    if not is_trusted(status.st_uid) or status.st_mode & stat.S_IWOTH:
        return True
    if not is_verified or not status.st_mode & stat.S_IWGRP:
        return False
    return has_access_list(descriptor) or not is_private_group(status.st_gid)
