"""Partial files: one of its own for every download, published by an atomic rename, cleaned up when its owner died."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from rankload._cache.failures import writing
from rankload._cache.layout import Entry

_logger = logging.getLogger("rankload")

#: A partial of another host cannot be told from a dead one but by its age. A download that has not written for a day
#: is over; should it live, it loses a rename and starts again.
_FOREIGN_MAX_AGE_SECONDS = 24 * 3600.0

_OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.partial$")


class Partial:
    """An open, exclusively created partial file in the directory of the final one.

    Use as a context manager: leaving it without publish() removes the file.

    Args:
        entry: whose file it is to become.
        needed_bytes: how long it is to be, for the message when the disk is full.
    """

    def __init__(self, entry: Entry, needed_bytes: int | None = None) -> None:
        pid = os.getpid()
        owner = f"{_machine()}-{pid}-{_started_at(pid) or 1}-{secrets.token_hex(4)}"
        self.path = entry.path.parent / f"{entry.partial_stem}.{owner}.partial"
        self._final_path, self._needed_bytes = entry.path, needed_bytes
        self._is_published = False
        with self.writing():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(self.path, flags, 0o666)  # the umask decides, as for any file

    def writing(self) -> AbstractContextManager[None]:
        """Translate the failures of a write to this file."""
        return writing(self.path, self._needed_bytes)

    def write(self, piece: bytes) -> None:
        """Append a piece."""
        view = memoryview(piece)
        with self.writing():
            while view:  # write(2) may take less than it is given, on a nearly full disk for one
                view = view[os.write(self.descriptor, view) :]

    def finish(self) -> os.stat_result:
        """Force the bytes to disk and close the file; return its status. NFS reports a full disk or quota only here."""
        with self.writing():
            os.fsync(self.descriptor)
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)
            return self.path.stat()  # by name, after the close: only then an NFS server has set the final mtime

    def publish(self) -> None:
        """Give the finished file its final name."""
        with writing(self._final_path):
            self.path.replace(self._final_path)
        self._is_published = True
        _sync_directory(self._final_path.parent)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor >= 0:
            with suppress(OSError):
                os.close(self.descriptor)
        if not self._is_published:
            with suppress(OSError):
                self.path.unlink()


def partials_of(entry: Entry) -> list[Path]:
    """List the partial files of an entry, whoever owns them."""
    try:
        siblings = list(entry.path.parent.iterdir())
    except OSError:
        return []
    stem = entry.partial_stem + "."
    return [path for path in siblings if path.name.startswith(stem) and _OWNER.search(path.name)]


def sizes_of_partials(entry: Entry) -> tuple[int, ...]:
    """Return the sizes of an entry's partial files: they change while anybody downloads it."""
    sizes = []
    for path in partials_of(entry):
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    return tuple(sizes)


def remove_dead_partials(entry: Entry) -> None:
    """Remove the partial files whose owner is dead."""
    for path in partials_of(entry):
        with suppress(OSError):
            if _owner_is_dead(path):
                path.unlink()
                _logger.info("removed %s: its owner is dead", path)


def _owner_is_dead(path: Path) -> bool:
    match = _OWNER.search(path.name)
    if match is None:
        return False
    machine, pid, started_at = match[1], int(match[2]), match[3]
    if machine == _machine():
        return _started_at(pid) not in (started_at, None)
    return time.time() - path.stat().st_mtime > _FOREIGN_MAX_AGE_SECONDS


def _machine() -> str:
    """Name the space in which a process id means something: kernel, boot and pid namespace."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _started_at(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot (proc(5), field 22).

    ``0`` where there is no such process; None where there is one that cannot be looked at: another user's under
    ``hidepid``, or any on a system without ``/proc``.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if _lives(pid) else "0"
    fields = text.rpartition(")")[2].split()
    return "0" if fields[0] in ("Z", "X") else fields[19]  # a zombie writes no more


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_directory(directory: Path) -> None:
    # some network filesystems cannot sync a directory; the rename is atomic all the same
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
