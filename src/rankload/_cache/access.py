"""Who may read and write what we put into a cache directory.

A directory that is setgid and writable by its group is how a group asks for a shared cache (chmod g+ws): what lies in
it must stay usable by the whole group, whatever the umask of the one who came first. So must our own directories in one
that everybody may write to. Elsewhere the umask decides, as for any file.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from rankload._errors import CacheError


def is_group_shared(directory: Path) -> bool:
    """Tell whether a directory is set up for a group."""
    try:
        mode = directory.stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def share_file(descriptor: int, directory: Path) -> None:
    """Give the group of a shared directory access to a new file in it."""
    if is_group_shared(directory):
        with suppress(OSError):  # not ours: then its owner has done it
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | 0o660)


def open_plain(path: Path) -> int:
    """Open a file of rankload's own for reading: no symbolic link, nor a pipe, which would wait for its writer.

    Raises:
        OSError: it is no plain file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return descriptor


def make_own_directory(directory: Path) -> None:
    """Make a directory of rankload's own inside a cache directory; who may write there may write here.

    Without a record, nobody would know whose file it is that another user has published.

    Raises:
        CacheError: a symbolic link stands in its place: who put it there would decide where we write.
        OSError: it cannot be made.
    """
    is_new = False
    with suppress(FileExistsError):
        directory.mkdir()
        is_new = True
    if directory.is_symlink():
        raise CacheError(f"{directory} is a symbolic link: refused; remove it", path=str(directory))
    if is_new:
        with suppress(OSError):
            parent, own = (stat.S_IMODE(path.stat().st_mode) for path in (directory.parent, directory))
            if is_group_shared(directory.parent):
                own |= 0o2770
            if parent & stat.S_IWOTH:
                own |= parent & 0o1777
            directory.chmod(own)
