"""Temporary files, and paths to open files; both work if TMPDIR is full or /dev/fd is missing."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from rankload.errors import CacheError, RankloadError

#: Folders in which Linux and macOS show a process its own descriptors. On Linux the first is a link to the second.
#: Minimal containers lack the first; a chroot without /proc lacks both.
_DESCRIPTOR_FOLDERS = ("/dev/fd", "/proc/self/fd")

#: Fallbacks for temporary files if TMPDIR is full, read-only or absent.
_OTHER_FOLDERS = ("/var/tmp", "/dev/shm")  # noqa: S108 - our files there have no name, our folders an unguessable one

_ADVICE = "set TMPDIR to a directory with room that this user can write to"


def descriptor_path(descriptor: int) -> str:
    """Return a path by which this process can open a descriptor's file again, even if another file has its name now.

    Raises:
        CacheError: the system has no such paths.
    """
    for folder in _DESCRIPTOR_FOLDERS:
        path = f"{folder}/{descriptor}"
        if Path(path).exists():
            return path
    raise CacheError(
        "open files cannot be reached by a path: there is neither /dev/fd nor /proc/self/fd; mount /proc "
        "(mount -t proc proc /proc), as every container engine does",
        path=_DESCRIPTOR_FOLDERS[-1],
    )


@contextmanager
def scratch_file(purpose: str, size_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """Make a temporary file without a name: in TMPDIR, or in another folder that has room.

    Args:
        purpose: what the file is for, for messages.
        size_bytes: expected size; None if unknown.

    Raises:
        CacheError: no folder has room, or the disk became full meanwhile.
    """
    tried: list[str] = []
    with ExitStack() as closing:
        file, folder = _first_file(size_bytes or 0, tried, closing)
        if file is None:
            need = f" of {_megabytes(size_bytes)}" if size_bytes else ""
            raise CacheError(f"no room for a temporary file{need} ({purpose}): {'; '.join(tried)}; {_ADVICE}")
        try:
            yield file
        except RankloadError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            text = f"{folder} is full: no room for a temporary file ({purpose}); {_ADVICE}"
            raise CacheError(text, path=folder, errno=error.errno) from error


def scratch_folder(links: dict[str, str], closing: ExitStack) -> Path:
    """Make a temporary folder of symbolic links.

    Args:
        links: target of each link, by name. Names may contain folders.
        closing: removes the folder.

    Raises:
        CacheError: no folder for temporary files can be written to.
    """
    tried: list[str] = []
    for parent in _folders(tried):
        with ExitStack() as made:
            try:
                folder = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="rankload-", dir=parent)))
                for name, target in links.items():
                    path = folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.symlink_to(target)
            except OSError as error:
                tried.append(f"{parent}: {error.strerror}")
                continue
            closing.push(made.pop_all())
            return folder
    raise CacheError(f"no room for a temporary folder: {'; '.join(tried)}; {_ADVICE}")


def _first_file(size_bytes: int, tried: list[str], closing: ExitStack) -> tuple[IO[bytes] | None, str]:
    for folder in _folders(tried):
        try:
            free_bytes = shutil.disk_usage(folder).free
            if free_bytes < size_bytes:
                tried.append(f"{folder}: {_megabytes(free_bytes)} free")
                continue
            return closing.enter_context(tempfile.TemporaryFile(dir=folder)), folder
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
    return None, ""


def _folders(tried: list[str]) -> Iterator[str]:
    """Yield folders for temporary files. Note in ``tried`` a TMPDIR that `tempfile` could not use."""
    chosen = ""
    with suppress(FileNotFoundError):  # tempfile found no usable folder
        chosen = tempfile.gettempdir()
    named = os.environ.get("TMPDIR")
    if named and Path(named).absolute() != Path(chosen):
        tried.append(f"TMPDIR={named}: cannot be used")
    yield from dict.fromkeys(folder for folder in (chosen, *_OTHER_FOLDERS) if folder)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
