"""Translate OSErrors on cache paths into CacheErrors that say what to do."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rankload._cache.access import is_trusted, name_of
from rankload._urls import hint_on_scheme, redact
from rankload.errors import CacheError, MissingFileError, RankloadError

T = TypeVar("T")

#: Advice for a directory that cannot be written to, with every way to choose another.
CHOOSE_ANOTHER = "choose another directory (model_dir=, --model-dir, or the environment's TORCH_HOME)"

#: Pauses before a file with a stale handle is opened again.
_REOPEN_PAUSES_SECONDS = (0.0, 0.05, 0.2, 0.5, 1.0)


@contextmanager
def wrap_write_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Translate errors of writing a file. ``needed_bytes`` is the space that the whole file takes."""
    try:
        yield
    except RankloadError:  # another rank's failure may be an OSError, too: keep its message
        raise
    except OSError as error:
        raise no_space_error(path, needed_bytes, error) if _is_full(error) else _write_error(path, error) from error


@contextmanager
def wrap_read_errors(path: Path | str) -> Iterator[None]:
    """Translate errors of reading a file."""
    try:
        yield
    except RankloadError:
        raise
    except OSError as error:
        raise CacheError(f"cannot read {path}: {_words(error)}", path=str(path), errno=error.errno) from error


def check_has_scheme(location: str, path: Path) -> None:
    """Raise MissingFileError if a path does not exist and looks like a mistyped URL, such as one without a scheme.

    Such a URL may be signed: the message shows neither its query nor a user and password.
    """
    if (hint := hint_on_scheme(location)) and not os.path.exists(path.parent):  # noqa: PTH110 - may be too long for one
        display_name = redact(location)
        raise MissingFileError(
            f"cannot read {display_name}: No such file or directory{hint}", path=display_name, errno=errno.ENOENT
        )


def retry_if_stale(read: Callable[[], T]) -> T:
    """Call a function that opens and reads a file. Repeat the call after ESTALE, with growing pauses.

    A network filesystem answers ESTALE if another host has replaced the file since this host looked up its name. The
    next lookup finds the new file.
    """
    for pause_seconds in _REOPEN_PAUSES_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        time.sleep(pause_seconds)
    return read()


def no_space_error(path: Path, needed_bytes: int | None, error: OSError) -> CacheError:
    """Return the error for a full disk or an exhausted quota, with the needed and the free space."""
    need = f"{_size(needed_bytes)} needed, " if needed_bytes is not None else ""
    return CacheError(
        f"cannot write {path}: {_words(error)}; {_have(path.parent, need)}, or {CHOOSE_ANOTHER}",
        path=str(path),
        errno=error.errno,
        needed_bytes=needed_bytes,
        free_bytes=_room(path.parent)[0],
    )


def why_no_room(directory: Path, error: OSError) -> str:
    """Return text to append if a directory cannot be made because the disk is full; else an empty text."""
    parent = next((path for path in directory.parents if path.exists()), directory)
    return f"; {_have(parent, '')}" if _is_full(error) else ""


def _write_error(path: Path, error: OSError) -> CacheError:
    may_not = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    who = f"this user cannot write {path.parent}{_whose(path)}: " if may_not else ""
    return CacheError(
        f"cannot write {path}: {_words(error)}; {who}{CHOOSE_ANOTHER}",
        path=str(path),
        errno=error.errno,
    )


def _whose(path: Path) -> str:
    """Return the owner of a file or its directory, in parentheses; empty if that is this user or root."""
    for one in (path, path.parent):
        with suppress(OSError):
            if not is_trusted(uid := one.lstat().st_uid):
                return f" ({one.name} belongs to {name_of(uid)})"
    return ""


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _words(error: OSError) -> str:
    return error.strerror or str(error)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _have(directory: Path, need: str) -> str:
    free_bytes, has_inodes = _room(directory)
    if free_bytes and not has_inodes:
        return f"no inode is left for another file in {directory}, though {_size(free_bytes)} are free; remove files"
    return f"{need}{_size(free_bytes)} free in {directory}; make room"


def _room(directory: Path) -> tuple[int, bool]:
    """Return the free bytes, and whether an inode is left for another file."""
    try:
        status = os.statvfs(directory)
    except OSError:
        return 0, True
    # filesystems that create inodes on demand (btrfs) report 0 inodes in total
    return status.f_bavail * status.f_frsize, bool(status.f_favail or not status.f_files)
