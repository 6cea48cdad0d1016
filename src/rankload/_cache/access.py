"""Decide who may read and write files in a cache directory, and which users' files rankload trusts.

A group asks for a shared cache by a directory that is setgid and group-writable (chmod g+ws). Its files must stay
usable by the whole group, whatever the umask of the first user. The same holds for rankload's own directories in a
world-writable directory. Elsewhere the umask decides, as for any file. Published files are never writable by others,
not even by the group: a mapped file must not change. Users who may write to the directory replace files instead.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rankload.errors import CacheError

#: Mode of new files, before the umask.
NEW_FILE_MODE = 0o644


def is_trusted(uid: int) -> bool:
    """Return whether rankload trusts files of a user: this user or root."""
    return uid in (0, os.geteuid())


def name_of(uid: int) -> str:
    """Return a user's name and uid for messages."""
    try:
        import pwd

        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except (ImportError, KeyError):
        return f"uid {uid}"


def is_private_group(gid: int) -> bool:
    """Return whether a group has this user's name and no other member, as far as the user database says."""
    try:
        import grp
        import pwd

        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except (ImportError, KeyError):
        return gid == os.geteuid()
    return group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def has_access_list(descriptor: int) -> bool:
    """Return whether an access control list names users or groups beside a file's own (acl(5))."""
    with suppress(OSError, AttributeError):  # the filesystem, or the system, has no such attributes
        return "system.posix_acl_access" in os.listxattr(descriptor)
    return False


def others_may_replace(path: Path) -> bool:
    """Return whether another user could replace a file that belongs to this user or root.

    Whoever may write to a directory on the file's path can, unless the directory's sticky bit forbids it (unlink(2)).
    """
    try:
        directories = {*path.absolute().parents, *path.resolve().parents}
        return any(_others_may_rename_in(directory.stat()) for directory in directories)
    except (OSError, RuntimeError):  # the path is changing now, or its links form a loop
        return True


def _others_may_rename_in(directory: os.stat_result) -> bool:
    is_shared = directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not directory.st_mode & stat.S_ISVTX
    return bool(is_shared) or not is_trusted(directory.st_uid)


def may_rename(path: Path, owner_uid: int) -> bool:
    """Return whether the directory's sticky bit lets this user replace a file of ``owner_uid`` (unlink(2))."""
    directory = path.parent.stat()
    return not directory.st_mode & stat.S_ISVTX or os.geteuid() in (0, owner_uid, directory.st_uid)


def is_group_shared(directory: Path) -> bool:
    """Return whether a directory is set up for a group."""
    try:
        mode = directory.stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def share_file(descriptor: int, directory: Path) -> None:
    """Let the group of a shared directory read a new file in it."""
    if is_group_shared(directory):
        with suppress(OSError):  # another user's file: its owner has done this
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | 0o640)


def open_plain(path: Path) -> int:
    """Open one of rankload's own files for reading. Reject symbolic links, and pipes, which would wait for a writer.

    Raises:
        OSError: the path is no plain file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return descriptor


def open_new(path: str | Path, *, folder: int | None = None) -> TextIO:
    """Create a text file that no other user can write to, whatever the umask.

    Args:
        path: path of the file.
        folder: descriptor of the directory that a relative path begins in; None for the working directory.

    Raises:
        OSError: the path exists already, or cannot be created.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, NEW_FILE_MODE, dir_fd=folder), "w", encoding="utf-8")


def write_own_json(path: Path, content: Any) -> None:
    """Write JSON atomically to a path inside a directory of rankload's, which is made if it does not exist.

    Raises:
        CacheError: the directory is no directory of rankload's (`check_own_directory`).
        OSError: the file cannot be written.
    """
    temporary = f"{path.name}.{secrets.token_hex(4)}.tmp"
    make_own_directory(path.parent)
    # by descriptor: the directory's owner could put a link to a directory of this user's in its place
    folder = _open_directory(path.parent)
    try:
        with open_new(temporary, folder=folder) as file:
            share_file(file.fileno(), path.parent)
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)  # exists only after an error or a signal
        os.close(folder)


def _open_directory(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def make_own_directory(directory: Path) -> None:
    """Make a directory inside a cache directory. Users who may write to its parent may write to it.

    Otherwise they could publish a file, but not the record that names its source.

    Raises:
        CacheError: something else is in its place (`check_own_directory`).
        OSError: the directory cannot be made.
    """
    is_new = False
    with suppress(FileExistsError):
        directory.mkdir(mode_of_new_in(directory.parent))
        is_new = True
    # a network filesystem may report that a directory exists and then, from its cache of absent names, that it does not
    with suppress(FileNotFoundError):
        check_own_directory(directory)
    if is_new:
        with suppress(OSError):
            _share_directory(directory)


def mode_of_new_in(directory: Path) -> int:
    """Return the mode of a new directory in another one, before the umask.

    An umask of 0, as in many containers, must not let more users in than the parent does.
    """
    return 0o777 & ~(0o022 & ~_mode_of(directory))


def _mode_of(directory: Path) -> int:
    return stat.S_IMODE(directory.stat().st_mode)


def _share_directory(directory: Path) -> None:
    """Give a new directory the group and world access that its parent's mode asks for."""
    # by descriptor: a user who may rename in the parent could put a link to a private directory at this path
    descriptor = _open_directory(directory)
    try:
        parent, own = _mode_of(directory.parent), stat.S_IMODE(os.fstat(descriptor).st_mode)
        if is_group_shared(directory.parent):
            own |= 0o2770
        if parent & stat.S_IWOTH:
            own |= parent & 0o1777
        os.fchmod(descriptor, own)
    finally:
        os.close(descriptor)


def check_own_directory(directory: Path) -> None:
    """Check an existing directory below the cache directory: rankload writes to it and trusts its files.

    Another user's directory is accepted only if the mode of its parent asks for sharing, or the same user owns both.

    Raises:
        CacheError: the path is a symbolic link, whose owner would decide where rankload writes; or no directory; or
            another user's.
        OSError: the path does not exist, or stat(2) fails.
    """
    status = directory.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise CacheError(f"{directory} is a symbolic link: refused; remove it", path=str(directory))
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"{directory} is not a directory: rankload needs one there; remove it", path=str(directory))
    if is_trusted(status.st_uid):
        return
    parent = directory.parent.stat()
    is_shared = parent.st_mode & stat.S_IWOTH or is_group_shared(directory.parent)
    if not is_shared and parent.st_uid != status.st_uid:
        raise CacheError(
            f"{directory} belongs to {name_of(status.st_uid)}: refused; remove it, or choose another directory",
            path=str(directory),
        )
