"""Resume the partial file of a dead download, and remove those that nobody can resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from rankload._cache.layout import Entry
from rankload._fetch.partials.journal import (
    Entries,
    beginning_path,
    journal_path,
    last_beat,
    partial_path_of,
    read_journal,
)
from rankload._fetch.partials.owner import Owner, owner_of, partials_of, siblings_of
from rankload._fetch.partials.partial import Partial
from rankload._settings import Settings

_logger = logging.getLogger("rankload")

#: A partial without a journal, of another host, cannot be told from a dead one but by its age. A download that has not
#: written for a day is over; should it live, it loses its file and starts again.
_FOREIGN_MAX_AGE_SECONDS = 24 * 3600.0

_COPY_BYTES = 8 << 20

#: Hex digits of a whole SHA-256.
_DIGEST_DIGITS = 64


@dataclass(frozen=True)
class _Candidate:
    path: Path
    owner: Owner
    entries: Entries


def adopt_into(
    partial: Partial, entry: Entry, url_keys: frozenset[str], sha256: str | None, settings: Settings,
    on_bytes: Callable[[int], None],
) -> None:  # fmt: skip
    """Fill a new partial file with what a dead download of the same content has left, if one has.

    A file whose owner is certainly dead is renamed. On another host nobody can tell a dead process from a frozen one,
    which would go on writing when it wakes: what is silent there is copied.

    Args:
        partial: new and empty.
        entry: whose partial files to look at.
        url_keys: URLs that the content may come from.
        sha256: the expected digest, or its beginning; with the same whole one, the URL does not matter.
        settings: how long an owner on another host must have been silent.
        on_bytes: called with the number of bytes copied so far.
    """
    now = os.fstat(partial.descriptor).st_mtime  # by the clock of the file server, as are the others' times
    for candidate in _candidates(entry, url_keys, sha256):
        try:
            if candidate.owner.is_dead:
                _rename(candidate, partial)
            elif not candidate.owner.is_here and now - candidate.entries.modified_at > _silence_seconds(settings):
                _copy(candidate, partial, on_bytes)
            else:
                continue
        except OSError as error:  # another process was quicker, or it cannot be read
            _logger.debug("cannot go on with %s: %s", candidate.path, error)
            continue
        _logger.info("going on with %s: %d bytes are there", candidate.path, partial.spans.total_bytes)
        return


def remove_dead_partials(entry: Entry, settings: Settings, now: float) -> None:
    """Remove the partial files that nobody can go on with, and, at ``now``, those of other hosts that are silent."""
    for path in partials_of(entry):
        with suppress(OSError):
            owner, beat_at = owner_of(path), last_beat(path)
            assert owner is not None
            if beat_at is None:
                is_silent = _fell_silent_early(path, now, settings)
            else:
                is_silent = now - beat_at > _silence_seconds(settings)
            is_old = now - path.lstat().st_mtime > _FOREIGN_MAX_AGE_SECONDS
            if owner.is_dead or (not owner.is_here and (is_silent or is_old)):
                path.unlink()
                journal_path(path).unlink(missing_ok=True)
                beginning_path(path).unlink(missing_ok=True)
                _logger.info("removed %s: its owner is dead", path)
    _remove_orphan_journals(entry, settings, now)


def _remove_orphan_journals(entry: Entry, settings: Settings, now: float) -> None:
    """Remove what a process has left that was killed between two renames: a journal whose partial file has moved on."""
    for path in siblings_of(entry):
        partial_path = partial_path_of(path)
        if partial_path is None or (owner := owner_of(partial_path)) is None:
            continue
        with suppress(OSError):
            is_silent = now - path.lstat().st_mtime > _silence_seconds(settings)
            if not os.path.lexists(partial_path) and (owner.is_dead or (not owner.is_here and is_silent)):
                path.unlink()


def progress_of_partials(entry: Entry) -> tuple[object, ...]:
    """Return what changes while anybody downloads an entry."""
    seen = []
    for path in partials_of(entry):
        with suppress(OSError):
            status = path.stat()
            seen.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(seen)


def _candidates(entry: Entry, url_keys: frozenset[str], sha256: str | None) -> list[_Candidate]:
    """List the partial files of the same content, the one with most bytes first."""
    found = []
    for path in partials_of(entry):
        owner, entries = owner_of(path), read_journal(path)
        if owner is None or entries is None or not entries.spans.total_bytes:
            continue
        content = entries.content
        if content.sha256 and sha256 and content.sha256 != sha256:
            continue
        # a prefix can be forged: it tells in the end whether a download was right, not whose bytes are another's
        is_same = content.url_key in url_keys or (content.sha256 == sha256 and len(sha256 or "") == _DIGEST_DIGITS)
        if is_same and (content.version.has_validator or sha256):
            found.append(_Candidate(path, owner, entries))
    return sorted(found, key=lambda candidate: -candidate.entries.spans.total_bytes)


def _silence_seconds(settings: Settings) -> float:
    """Return how long a dead owner has been silent in its journal when its lease is taken over.

    Both are beaten in at the same intervals, but not at the same moments: the journal's last beat may be later than the
    lease's by almost one of them.
    """
    return settings.lease_seconds - settings.lease_heartbeat_seconds


def _fell_silent_early(path: Path, now: float, settings: Settings) -> bool:
    """Return whether its owner was killed before its journal was complete: a living one would beat in it by now.

    Or before it had begun one, with its file still empty. Should that owner live, it loses its file and starts again.
    """
    with suppress(OSError):
        return now - beginning_path(path).lstat().st_mtime > _silence_seconds(settings)
    status = path.lstat()
    return status.st_size == 0 and now - status.st_mtime > _silence_seconds(settings)


def _rename(candidate: _Candidate, partial: Partial) -> None:
    descriptor = _open(candidate.path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_size < max(end for _, end in candidate.entries.spans):
            raise OSError("it is shorter than its journal says")
        candidate.path.replace(partial.path)
    except OSError:
        os.close(descriptor)
        raise
    partial.adopt(descriptor, candidate.entries.content, candidate.entries.spans)
    with suppress(OSError):
        journal_path(candidate.path).replace(journal_path(partial.path))


def _copy(candidate: _Candidate, partial: Partial, on_bytes: Callable[[int], None]) -> None:
    source = _open(candidate.path, os.O_RDONLY)
    copied = 0
    try:
        for begin, end in candidate.entries.spans:
            while begin < end:
                count = _copy_some(source, partial.descriptor, begin, min(end - begin, _COPY_BYTES))
                begin, copied = begin + count, copied + count
                on_bytes(copied)
    finally:
        os.close(source)
    partial.adopt(partial.descriptor, candidate.entries.content, candidate.entries.spans)


def _copy_some(source: int, target: int, offset: int, count: int) -> int:
    try:
        copied = os.copy_file_range(source, target, count, offset, offset)  # on some filesystems without moving a byte
    except (OSError, AttributeError):
        copied = os.pwrite(target, os.pread(source, count, offset), offset)
    if not copied:
        raise OSError(f"it ends at {offset}")
    return copied


def _open(path: Path, flags: int) -> int:
    """Open a file that we may go on with: a plain one of this user's, that nobody can reach by another name."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
        os.close(descriptor)
        raise OSError("not a plain file of this user's own")
    return descriptor
