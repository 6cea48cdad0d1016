"""Partial files: one of its own for every download, published by an atomic rename, cleaned up when its owner died."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

from rankload._cache.layout import Entry
from rankload._errors import CacheError

_logger = logging.getLogger("rankload")

#: A partial of another host cannot be told from a dead one but by its age. A download that has not written for a day
#: is over; should it live, it loses a rename and starts again.
_FOREIGN_MAX_AGE_SECONDS = 24 * 3600.0

_OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.partial$")


class Partial:
    """An open, exclusively created partial file in the directory of the final one.

    Use as a context manager: leaving it without publish() removes the file.
    """

    def __init__(self, entry: Entry) -> None:
        pid = os.getpid()
        owner = f"{_machine()}-{pid}-{_started_at(pid)}-{secrets.token_hex(4)}"
        self.path = entry.path.parent / f"{entry.partial_stem}.{owner}.partial"
        self._final_path = entry.path
        with naming(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(self.path, flags, 0o666)  # the umask decides, as for any file

    def sync(self) -> None:
        """Force the bytes to disk. NFS reports a full disk or quota only here."""
        with naming(self.path):
            os.fsync(self.descriptor)

    def publish(self) -> os.stat_result:
        """Close the file and give it its final name; return its status."""
        with naming(self._final_path):
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)
            self.path.replace(self._final_path)
            _sync_directory(self._final_path.parent)
            return self._final_path.stat()

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor >= 0:
            with suppress(OSError):
                os.close(self.descriptor)
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
        return _started_at(pid) != started_at
    return time.time() - path.stat().st_mtime > _FOREIGN_MAX_AGE_SECONDS


def _machine() -> str:
    """Name the space in which a process id means something: kernel, boot and pid namespace."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _started_at(pid: int) -> str:
    """Return when a process started, in clock ticks since boot (proc(5), field 22); ``0`` where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return "0" if Path("/proc/self/stat").exists() or not _lives(pid) else "1"
    except OSError:
        return "1"
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


class naming:
    """Translates an OSError on a cache path into a CacheError that says what to do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, CacheError):
            raise cache_error(self._path, error) from error


def cache_error(path: Path, error: OSError, needed_bytes: int | None = None) -> CacheError:
    """Return a CacheError for a failed write, naming the space that is needed and there is."""
    advice = "pass model_dir= or set TORCH_HOME to another directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f"{needed_bytes / 1e9:.2f} GB needed, " if needed_bytes is not None else ""
        advice = f"{need}{_free_bytes(path.parent) / 1e9:.2f} GB free in {path.parent}; make room, or {advice}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = f"this user cannot write {path.parent}: {advice}"
    return CacheError(f"cannot write {path}: {error.strerror or error}; {advice}", path=str(path), errno=error.errno)


def _free_bytes(directory: Path) -> int:
    try:
        status = os.statvfs(directory)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize
