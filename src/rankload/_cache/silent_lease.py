"""Remove the lease of a dead holder on filesystems where filelock cannot take it over.

filelock 4.3 takes over only by renameat2(RENAME_EXCHANGE), and waits forever if the filesystem refuses it: NFS, GPFS,
BeeGFS, MooseFS, most of FUSE. A lease saves bandwidth and nothing else. So a marker that has not changed for longer
than the lease lasts is removed, with operations that every filesystem has.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rankload._cache.access import open_plain

#: Extra time beyond the lease's duration: filelock's own takeover comes first where it works. Longer than its polls.
MARGIN_SECONDS = 1.0

#: Most time that one check may count. If this process was stopped for an hour, only one second of that hour counts.
_MAX_SECONDS = 1.0

_MAX_BYTES = 64 << 10

#: Inode, size, time of modification: a heartbeat changes the last.
_Mark = tuple[int, int, int]


class SilentMarker:
    """A lease's marker, watched by this process's own clock, and removed when its holder is silent for too long.

    Args:
        path: path of the marker.
        lease_seconds: duration of the lease.
        clock: monotonic clock, in seconds.
    """

    def __init__(self, path: Path, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._limit_seconds, self._clock = path, lease_seconds + MARGIN_SECONDS, clock
        self._mark: _Mark | None = None
        self._silent_seconds, self._looked_at = 0.0, clock()

    def is_in_the_way(self) -> bool:
        """Check the marker, and remove a silent one. Return whether the marker is silent and cannot be removed."""
        now = self._clock()
        elapsed, self._looked_at = now - self._looked_at, now
        mark = _mark_of(self._path)
        if mark is None or mark != self._mark:
            self._mark, self._silent_seconds = mark, 0.0
            return False
        self._silent_seconds += min(elapsed, _MAX_SECONDS)
        if self._silent_seconds <= self._limit_seconds:
            return False
        self._silent_seconds = 0.0
        return not _remove(self._path, mark)


def _mark_of(path: Path) -> _Mark | None:
    """Return the marker's inode, size and time. Opening the file makes a network filesystem ask its server."""
    try:
        descriptor = open_plain(path)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _remove(path: Path, mark: _Mark) -> bool:
    """Remove a marker unless it has changed. Return whether the old marker is gone.

    The marker is renamed first. Two waiters may do this at the same time: the second must not remove the marker of the
    first, who holds the lease by then.
    """
    content = _content_of(path)
    if content is None or _mark_of(path) != mark:
        return True
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if _content_of(aside) != content:  # another token: the marker of a live holder
        with suppress(OSError):
            os.link(aside, path)  # put it back; rename would replace the marker of a third holder
    with suppress(OSError):
        aside.unlink()
    return True


def _content_of(path: Path) -> bytes | None:
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            return file.read(_MAX_BYTES)
    except OSError:
        return None
