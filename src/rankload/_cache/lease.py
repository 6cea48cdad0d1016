"""The lease between jobs that share a cache: it saves a second download, and nothing more.

Filesystem locks lie (Lustre localflock, NFS local_lock, GPFS flock), so correctness never depends on one: every
download has a partial file of its own and is published by an atomic rename. A lease that cannot be had, for whatever
reason, costs a warning and perhaps bandwidth.
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

#: What filelock raises where there can be no lease.
_UNUSABLE = (OSError, LeaseSettingsMismatch, NotImplementedError)


@contextmanager
def hold_lease(
    path: Path, settings: Settings, *, progress_mark: Callable[[], object], on_wait: Callable[[], bool]
) -> Iterator[bool]:
    """Hold the lease while the context lasts, or go on without it.

    Args:
        path: the lease's path.
        settings: gives the duration and the patience with a holder that does not move.
        progress_mark: changes while the holder makes progress (the size of its partial file).
        on_wait: called at every poll; returns True when the lease is not needed any more.

    Yields:
        Whether the lease is held.
    """
    lease = _lease(path, settings)
    try:
        yield lease is not None and _acquire(lease, path, settings, progress_mark, on_wait)
    finally:
        # also when a signal came in the middle of acquiring it: its heartbeat would keep everybody away forever
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
                thread_local=False,  # or heartbeat and a signal handler's release would each see a lease of their own
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
    except RankloadError:  # what another rank failed with; it may be an OSError, too
        raise
    except Timeout:  # cancelled: not needed any more, or not worth waiting for
        if not on_wait():
            _warn(path, "its holder is silent, makes no progress, or is another user")
        return False
    except _UNUSABLE as error:
        _warn(path, f"{type(error).__name__}: {error}")
        return False
    return True


class _Patience:
    """With a holder that lives: it ends when nothing has moved for long, or a stuck job would block all others."""

    def __init__(self, progress_mark: Callable[[], object], limit_seconds: float) -> None:
        self._progress_mark, self._limit_seconds = progress_mark, limit_seconds
        self._no_progress = NoProgressTimer(progress_mark(), limit_seconds / 5)
        self._looked_at = time.monotonic()

    def is_over(self) -> bool:
        now = time.monotonic()
        # The mark costs a listing of the directory: a thousand waiters must not take one at every poll.
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
    _logger.warning("going on without the lease %s (%s): another job may download the same file too", path, why)
