"""Resume the partial file of a dead download, and remove partial files that no download can resume."""

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

#: Age after which another host's partial file without a journal counts as dead; nothing else shows that. A download
#: that has not written for a day is over. If it is alive after all, it loses its file and starts again.
_FOREIGN_MAX_AGE_SECONDS = 24 * 3600.0

_COPY_BYTES = 8 << 20

#: Number of hex digits of a full SHA-256.
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
    """Fill a new partial file with the bytes that a dead download of the same content left, if there is one.

    A file whose owner is certainly dead is renamed. A dead process on another host looks like a frozen one, which would
    continue to write when it wakes. So a silent file of another host is copied.

    Args:
        partial: new, empty partial file.
        entry: cache entry whose partial files to consider.
        url_keys: keys of the URLs that the content may come from.
        sha256: expected digest, or its first digits. If a full digest is the same, the URL does not matter.
        settings: how long an owner on another host must have been silent.
        on_bytes: called with the number of bytes copied so far.
    """
    now = os.fstat(partial.descriptor).st_mtime  # by the clock of the file server, like the other files' times
    for candidate in _candidates(entry, url_keys, sha256):
        try:
            if candidate.owner.is_dead:
                _rename(candidate, partial)
            elif not candidate.owner.is_here and now - candidate.entries.modified_at > _silence_seconds(settings):
                _copy(candidate, partial, on_bytes)
            else:
                continue
        except OSError as error:  # another process was faster, or the file cannot be read
            _logger.debug("cannot resume %s: %s", candidate.path, error)
            continue
        _logger.info("resuming %s: it has %d bytes", candidate.path, partial.spans.total_bytes)
        return


def remove_dead_partials(entry: Entry, settings: Settings, now: float) -> None:
    """Remove partial files of dead owners, and those of other hosts that are silent at the time ``now``."""
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
    """Remove journals without a partial file, from processes that were killed between the renames of the two."""
    for path in siblings_of(entry):
        partial_path = partial_path_of(path)
        if partial_path is None or (owner := owner_of(partial_path)) is None:
            continue
        with suppress(OSError):
            is_silent = now - path.lstat().st_mtime > _silence_seconds(settings)
            if not os.path.lexists(partial_path) and (owner.is_dead or (not owner.is_here and is_silent)):
                path.unlink()


def progress_of_partials(entry: Entry) -> tuple[object, ...]:
    """Return a value that changes while any process downloads an entry."""
    seen = []
    for path in partials_of(entry):
        with suppress(OSError):
            status = path.stat()
            seen.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(seen)


def _candidates(entry: Entry, url_keys: frozenset[str], sha256: str | None) -> list[_Candidate]:
    """List the partial files of the same content, the one with the most bytes first."""
    found = []
    for path in partials_of(entry):
        owner, entries = owner_of(path), read_journal(path)
        if owner is None or entries is None or not entries.spans.total_bytes:
            continue
        content = entries.content
        if content.sha256 and sha256 and content.sha256 != sha256:
            continue
        # a prefix can be forged: it may check a finished download, but not identify another URL's bytes
        is_same = content.url_key in url_keys or (content.sha256 == sha256 and len(sha256 or "") == _DIGEST_DIGITS)
        if is_same and (content.version.has_validator or sha256):
            found.append(_Candidate(path, owner, entries))
    return sorted(found, key=lambda candidate: -candidate.entries.spans.total_bytes)


def _silence_seconds(settings: Settings) -> float:
    """Return how long a dead owner's journal has been silent, at least, when the owner's lease is taken over.

    The owner writes to both at the same intervals, but not at the same moments. The journal's last write may be later
    than the lease's by almost one interval.
    """
    return settings.lease_seconds - settings.lease_heartbeat_seconds


def _fell_silent_early(path: Path, now: float, settings: Settings) -> bool:
    """Return whether a partial file's owner was killed before its journal was complete, or was begun.

    A living owner would have completed the journal by now, or would have written to its file. If the owner is alive
    after all, it loses its file and starts again.
    """
    with suppress(OSError):
        return now - beginning_path(path).lstat().st_mtime > _silence_seconds(settings)
    status = path.lstat()
    return status.st_size == 0 and now - status.st_mtime > _silence_seconds(settings)


def _rename(candidate: _Candidate, partial: Partial) -> None:
    descriptor = _open(candidate.path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_size < max(end for _, end in candidate.entries.spans):
            raise OSError("the file is shorter than its journal says")
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
        copied = os.copy_file_range(source, target, count, offset, offset)  # some filesystems share the blocks
    except (OSError, AttributeError):
        copied = os.pwrite(target, os.pread(source, count, offset), offset)
    if not copied:
        raise OSError(f"the file ends at {offset}")
    return copied


def _open(path: Path, flags: int) -> int:
    """Open a file that may be resumed: a plain file of this user, without other hard links."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
        os.close(descriptor)
        raise OSError("not a plain file of this user")
    return descriptor
