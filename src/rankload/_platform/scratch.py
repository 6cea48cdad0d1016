"""Temporary files and paths to open files, also where TMPDIR is full or /dev/fd is missing."""

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

#: Where Linux and macOS show a process its own descriptors. The first is a link to the second on Linux, and minimal
#: containers lack it; a chroot without /proc lacks both.
_DESCRIPTOR_FOLDERS = ("/dev/fd", "/proc/self/fd")

#: Where else a temporary file may go, if TMPDIR is full, read-only or absent.
_OTHER_FOLDERS = ("/var/tmp", "/dev/shm")  # noqa: S108 - files there have no name, and folders one that nobody can guess

_ADVICE = "set TMPDIR to a directory with room that this user can write to"


def descriptor_path(descriptor: int) -> str:
    """Return a path by which this process opens what a descriptor stands for, whatever has its name by now.

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
    """Make a file without a name: in TMPDIR, or where there is room for it.

    Args:
        purpose: what goes into it, for messages.
        size_bytes: how much that is, as far as it is known.

    Raises:
        CacheError: there is no place for it, or it has become full.
    """
    tried: list[str] = []
    with ExitStack() as closing:
        file, folder = _first_file(size_bytes or 0, tried, closing)
        if file is None:
            need = f" of {_megabytes(size_bytes)}" if size_bytes else ""
            raise CacheError(f"no place for a temporary file{need} ({purpose}): {'; '.join(tried)}; {_ADVICE}")
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
    """Make a folder of symbolic links.

    Args:
        links: what each name leads to. Names may have folders of their own.
        closing: removes it.

    Raises:
        CacheError: there is no place for it.
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
    raise CacheError(f"no place for a temporary folder: {'; '.join(tried)}; {_ADVICE}")


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
    """Yield where temporary files may go; note the TMPDIR that Python's own choice has passed over."""
    chosen = ""
    with suppress(FileNotFoundError):  # there is none at all
        chosen = tempfile.gettempdir()
    named = os.environ.get("TMPDIR")
    if named and Path(named).absolute() != Path(chosen):
        tried.append(f"TMPDIR={named}: cannot be used")
    yield from dict.fromkeys(folder for folder in (chosen, *_OTHER_FOLDERS) if folder)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
