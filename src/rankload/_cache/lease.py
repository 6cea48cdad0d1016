"""The lease between jobs that share a cache: it saves a second download, and nothing more.

Filesystem locks are unreliable (Lustre localflock, NFS local_lock, GPFS flock), so correctness never depends on one:
every download has its own partial file and is published by an atomic rename. A lease that cannot be acquired costs a
warning and perhaps bandwidth.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from rankload._cache.access import make_own_directory
from rankload._cache.silent_lease import SilentMarker
from rankload._platform.clock import NoProgressTimer
from rankload._settings import Settings
from rankload.errors import RankloadError

_logger = logging.getLogger("rankload")

#: Errors that filelock raises if the filesystem or the platform cannot have a lease.
_UNUSABLE = (OSError, LeaseSettingsMismatch, NotImplementedError)


@contextmanager
def hold_lease(
    path: Path, settings: Settings, *, progress_mark: Callable[[], object], on_wait: Callable[[], bool]
) -> Iterator[bool]:
    """Hold the lease while the context lasts, or continue without it.

    Args:
        path: path of the lease.
        settings: duration of the lease, and patience with a holder that makes no progress.
        progress_mark: returns a value that changes while the holder makes progress (the size of its partial file).
        on_wait: called at every poll; returns True when the lease is no longer needed.

    Yields:
        Whether the lease is held.
    """
    lease = _lease(path, settings)
    try:
        yield lease is not None and _acquire(lease, path, settings, progress_mark, on_wait)
    finally:
        # also after a signal during acquire: the lease's heartbeat would keep all other jobs waiting forever
        if lease is not None:
            with suppress(OSError):
                lease.release(force=True)


def _lease(path: Path, settings: Settings) -> SoftFileLease | None:
    try:
        make_own_directory(path.parent)
        if path.is_symlink():
            _warn(path, "it is a symbolic link")
        elif _is_foreign(path):
            _warn(path, "it belongs to another user")
        else:
            return SoftFileLease(
                path,
                lease_duration=settings.lease_seconds,
                heartbeat_interval=settings.lease_heartbeat_seconds,
                thread_local=False,  # the heartbeat thread and a signal handler's release must see the same lease
            )
    except RankloadError:
        raise
    except _UNUSABLE as error:
        _warn(path, f"{type(error).__name__}: {error}")
    return None


def _acquire(
    lease: SoftFileLease,
    path: Path,
    settings: Settings,
    progress_mark: Callable[[], object],
    on_wait: Callable[[], bool],
) -> bool:
    try:
        patience = _Patience(progress_mark, settings.progress_seconds + settings.lease_seconds)
        marker = SilentMarker(path, settings.lease_seconds)
        lease.acquire(
            timeout=-1,
            poll_interval=random.uniform(0.1, 0.4),  # noqa: S311 - a thousand array tasks must not poll in step
            cancel_check=lambda: on_wait() or patience.is_over() or _is_foreign(path) or marker.is_in_the_way(),
        )
    except RankloadError:  # another rank's error, which may be an OSError, too
        raise
    except Timeout:  # cancelled: no longer needed, or not worth the wait
        if not on_wait():
            _warn(path, "its holder is silent, makes no progress, or is another user")
        return False
    except _UNUSABLE as error:
        _warn(path, f"{type(error).__name__}: {error}")
        return False
    return True


class _Patience:
    """A limit on the wait for a live holder that makes no progress: a stuck job must not block all others."""

    def __init__(self, progress_mark: Callable[[], object], limit_seconds: float) -> None:
        self._progress_mark, self._limit_seconds = progress_mark, limit_seconds
        self._no_progress = NoProgressTimer(progress_mark(), limit_seconds / 5)
        self._looked_at = time.monotonic()

    def is_over(self) -> bool:
        now = time.monotonic()
        # The mark costs a directory listing: a thousand waiters must not list the directory at every poll.
        if now - self._looked_at < self._limit_seconds / 20:
            return False
        self._looked_at = now
        return self._no_progress.seconds_without_progress(self._progress_mark()) > self._limit_seconds


def _is_foreign(path: Path) -> bool:
    try:
        return path.lstat().st_uid != os.geteuid()
    except OSError:
        return False


def _warn(path: Path, why: str) -> None:
    _logger.warning("continuing without the lease %s (%s): another job may download the same file, too", path, why)
