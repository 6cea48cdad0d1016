"""Inspect a cache entry: its file and record, their owners, and whether rankload may replace the file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISLNK, S_ISREG

from rankload._cache.access import check_own_directory, is_trusted, may_rename
from rankload._cache.files import retry_if_stale, wrap_read_errors
from rankload._cache.layout import Entry
from rankload._cache.record import FoundRecord, Record, find_record
from rankload._fetch.models import FetchRequest
from rankload._fetch.policy import Cached
from rankload._platform.linux import birth_ns
from rankload.errors import CacheError


def inspect(entry: Entry, request: FetchRequest) -> Cached:
    """Inspect an entry. Changes nothing.

    Raises:
        CacheError: the path is not that of a plain file or own directory, or it cannot be read.
    """
    for directory in (*entry.directories, entry.record_path.parent):
        with suppress(FileNotFoundError), wrap_read_errors(directory):
            check_own_directory(directory)
    with wrap_read_errors(entry.path):
        found = find_record(entry.record_path)
    record, problem = (found.record, found.problem) if found else (None, "")
    with wrap_read_errors(entry.path):
        try:
            link = retry_if_stale(entry.path.lstat)
        except FileNotFoundError:
            return Cached(None, record, problem)
        try:
            status = retry_if_stale(entry.path.stat)
        except FileNotFoundError:
            return Cached(link, None, "it is a symbolic link to a file that does not exist")
    is_link = S_ISLNK(link.st_mode)
    if is_link and not is_trusted(link.st_uid):
        raise CacheError(
            f"{entry.path} is another user's symbolic link: refused; remove it or pass file_name=", path=str(entry.path)
        )
    if not S_ISREG(status.st_mode):
        raise CacheError(f"{entry.path} is not a plain file; remove it or pass file_name=", path=str(entry.path))
    owners = {status.st_uid} | ({found.owner_uid} if found and found.owner_uid is not None else set())
    return Cached(
        status,
        record,
        problem,
        is_trusted=all(map(is_trusted, owners)),
        is_of_one_url=entry.is_separate or request.is_index or request.is_part,
        is_replaceable=not is_link and found is not None and _is_replaceable(entry, status, found),
    )


def _is_replaceable(entry: Entry, status: os.stat_result, found: FoundRecord) -> bool:
    """Return whether rankload published a file, according to its record, and this user may replace the file.

    A record counts for files of its own owner; a trusted user's record counts for all files. A file in a directory for
    one URL only was put there by rankload, even in a copy of the cache, which has other inodes.
    """
    record, owner_uid = found.record, found.owner_uid
    if record is None or owner_uid is None or record.source != "download":
        return False
    speaks_for_it = is_trusted(owner_uid) or owner_uid == status.st_uid
    is_that_file = entry.is_separate or _is_that_file(entry.path, status.st_ino, record)
    if not speaks_for_it or not is_that_file:
        return False
    return may_rename(entry.path, status.st_uid) and may_rename(entry.record_path, owner_uid)


def is_published(cached: Cached) -> bool:
    """Return whether rankload published the file, according to a trusted record."""
    return cached.is_trusted and cached.record is not None and cached.record.source == "download"


def _is_that_file(path: Path, inode: int, record: Record) -> bool:
    """Return whether a record describes a file, or the file that is about to replace it."""
    birth = birth_ns(path)
    if birth is not None and (record.replaces_inode, record.replaces_birth_ns) == (inode, birth):
        return True
    return record.inode == inode and (birth is None or record.birth_ns in (None, birth))


def believed_digest(cached: Cached) -> str | None:
    """Return the recorded digest; None if file or record belong to an untrusted user."""
    return cached.record.sha256 if cached.record and cached.is_trusted else None
