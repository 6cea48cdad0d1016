"""Look a request up in the cache: find the entry that is the request's, and whether its file can be used."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from rankload._cache.access import make_own_directory
from rankload._cache.files import retry_if_stale, wrap_read_errors, wrap_write_errors
from rankload._cache.layout import Entry
from rankload._cache.quarantine import quarantine
from rankload._cache.record import Record, is_on_record, write_record
from rankload._fetch.checkpoint_table import hint_on_name
from rankload._fetch.digests import check_digest, claims_of
from rankload._fetch.file_digest import sha256_of_file
from rankload._fetch.index_files import check_index
from rankload._fetch.inspection import believed_digest, inspect, is_published
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.origin import Claim
from rankload._fetch.policy import Action, Cached, Decision, after_check, decide, known_digest, may_publish
from rankload._formats.hints import hint_on_directory
from rankload._formats.sniff import check_structure
from rankload._platform.linux import birth_ns, rename_if_absent
from rankload._types import FetchedFile, Progress, Provenance, Report
from rankload.errors import CacheError, DigestMismatchError, MissingFileError, RankloadError, VerificationError

_logger = logging.getLogger("rankload")

FileVersion = tuple[int, int]


@dataclass(frozen=True)
class CacheLookup:
    """The result of a lookup in the cache.

    Attributes:
        entry: entry that is the request's.
        version: version of the entry's file, None without one. It changes when a process publishes the file.
        file: the file, if it can be used; else None.
        damage: why the file is damaged, if it is, and should be set aside; else None.
        reason: why the file can or cannot be used.
        is_unvouched: whether nothing shows that the file is the URL's. The caller must `adopt` or `reject` it.
        record: record of the file; None if there is none.
        is_replaceable: whether rankload published the file, and this user may replace it.
    """

    entry: Entry
    version: FileVersion | None
    file: FetchedFile | None = None
    damage: str | None = None
    reason: str = ""
    is_unvouched: bool = False
    record: Record | None = None
    is_replaceable: bool = False


def look_up(entry: Entry, request: FetchRequest, report: Report) -> CacheLookup:
    """Find the entry that is the request's, and whether its file can be used. Changes only records.

    Raises:
        CacheError: the path is not that of a plain file, or it cannot be read.
    """
    cached = inspect(entry, request)
    plan, file = decide(request, cached), None
    if plan.action is Action.USE:
        assert cached.status is not None
        sha256 = believed_digest(cached)
        file = FetchedFile(entry.path, cached.status.st_size, sha256, "cache", is_published=is_published(cached))
    if plan.action is Action.CHECK and cached.record is None and not entry.is_separate:
        plan = _unless_anothers(plan, entry, cached, request)
    if plan.action is Action.CHECK:
        plan, file = _check(entry, cached, request, report)
    _logger.debug("%s: %s (%s)", entry.path, plan.action.name, plan.reason)
    if plan.action is Action.DOWNLOAD and cached.status is not None:
        _logger.warning("%s: %s; fetching it again", entry.path, plan.reason)
    if plan.action is Action.SEPARATE:
        return look_up(_separate(entry, plan.reason, request), request, report)
    damage = plan.reason if plan.action is Action.REPLACE else None
    is_unvouched = file is not None and cached.record is None and file.sha256 is None
    return CacheLookup(
        entry,
        _version_of(cached.status),
        file,
        damage,
        plan.reason,
        is_unvouched,
        cached.record,
        cached.is_replaceable,
    )


def adopt(
    lookup: CacheLookup, request: FetchRequest, *, etag: str | None, sha256: str | None, vouched_by: str | None
) -> None:
    """Record that an unvouched file is the URL's, as the origin has confirmed. Do nothing in a read-only cache."""
    with suppress(OSError):
        status = lookup.entry.path.stat()
        if _version_of(status) == lookup.version:
            facts = (status.st_size, status.st_mtime_ns, status.st_ino, etag, sha256, vouched_by)
            record = Record(request.url.display_name, request.url.key, *facts, "adopted")
            write_record(lookup.entry.record_path, record)


def reject(lookup: CacheLookup, reason: str, request: FetchRequest) -> Entry:
    """Leave a file alone that is not, or no longer, the URL's; return the URL's separate entry.

    Raises:
        CacheError: the file is in the separate entry already.
    """
    if lookup.record is not None and lookup.record.source == "adopted":
        with suppress(OSError):
            lookup.entry.record_path.unlink()  # else the next call would trust the record again
    return _separate(lookup.entry, reason, request)


def _unless_anothers(plan: Decision, entry: Entry, cached: Cached, request: FetchRequest) -> Decision:
    """Return the plan to check a file without a record, unless the file is certainly not this URL's."""
    assert cached.status is not None
    if os.path.lexists(entry.separate(request.url).path):
        return Decision(Action.SEPARATE, "the file has no record, and rankload has fetched another file for the URL")
    # decide here: the origin would compare only a piece of the file
    if request.sha256 is None and is_on_record(entry.record_path.parent, cached.status):
        return Decision(Action.SEPARATE, "the file belongs to another name, which this filesystem treats as the same")
    return plan


def _separate(entry: Entry, reason: str, request: FetchRequest) -> Entry:
    """Return the separate entry, which is for the URL only.

    Raises:
        CacheError: ``entry`` is the separate one already.
    """
    display_name = request.url.display_name
    if entry.is_separate:
        raise CacheError(
            f"{entry.path} cannot be used for {display_name}: {reason}; remove it, or choose another directory "
            "(model_dir=)",
            path=str(entry.path),
        )
    separate = entry.separate(request.url)
    _logger.warning("%s: %s; keeping %s at %s", entry.path, reason, display_name, separate.path)
    make_directories(separate)
    return separate


def use_in_place(path: Path, request: FetchRequest, report: Report) -> FetchedFile:
    """Check a local file outside the cache, which is used in place.

    Raises:
        VerificationError: the file failed verification.
        CacheError: the file cannot be read.
    """
    try:
        with wrap_read_errors(path):
            return retry_if_stale(lambda: _in_place(path, request, report))
    except MissingFileError as error:
        error.message += hint_on_name(request.url.raw)
        raise


def file_version(entry: Entry) -> FileVersion | None:
    """Return a version that changes when a process publishes the entry's file; None without a file."""
    try:
        return _version_of(entry.path.stat())
    except OSError:
        return None


def may_be_published(entry: Entry, request: FetchRequest) -> bool:
    """Return whether a download may take its final name: no file has it, or one that rankload published for the URL."""
    return may_publish(request, inspect(entry, request))


def set_damaged_file_aside(lookup: CacheLookup) -> None:
    """Set a damaged file aside, as the lookup has found it.

    Call this only under the lease. If the file has changed since the lookup, it stays: another job may have published a
    good one.
    """

    def move_to(path: Path) -> None:
        lookup.entry.path.replace(path)
        if _version_of(path.lstat()) != lookup.version:  # another file has the name now, perhaps a user's own
            rename_if_absent(path, lookup.entry.path)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    if lookup.damage is not None:
        path = quarantine(lookup.entry, lookup.damage, move_to)
        kept = f" (kept at {path})" if path else ""
        _logger.warning("%s: %s%s; fetching it again", lookup.entry.path, lookup.damage, kept)


def make_directories(entry: Entry) -> None:
    """Make the directories of an entry below the cache directory and, if possible, that of its record.

    Raises:
        CacheError: a directory cannot be made, or is not one of rankload's own (`check_own_directory`).
    """
    for directory in entry.directories:
        with wrap_write_errors(directory):
            make_own_directory(directory)
    try:
        # make it before any lookup: another node would cache its absence for a minute (nfs(5), acdirmax)
        make_own_directory(entry.record_path.parent)
    except CacheError:
        raise
    except OSError:  # a read-only cache, or a full disk: existing files can still be used
        pass


def _in_place(path: Path, request: FetchRequest, report: Report) -> FetchedFile:
    status = path.stat()
    if not S_ISREG(status.st_mode):  # opening a pipe would wait for its writer forever
        raise CacheError(f"cannot read {path}: it is no regular file{hint_on_directory(path)}", path=str(path))
    check_structure(path, must_be_checkpoint=request.must_be_checkpoint, origin=str(path))
    sha256, claims = None, claims_of(request)
    if claims:
        sha256 = _hash(path, status.st_size, report)
        check_digest(sha256, claims, str(path))
    return FetchedFile(path, status.st_size, sha256, "local")


def _version_of(status: os.stat_result | None) -> FileVersion | None:
    return None if status is None else (status.st_ino, status.st_mtime_ns)


def _check(entry: Entry, cached: Cached, request: FetchRequest, report: Report) -> tuple[Decision, FetchedFile | None]:
    """Check a file for which no record vouches, and adopt it if it passes.

    Returns:
        What to do next, and the file if it can be used.
    """
    assert cached.status is not None
    status, record = cached.status, cached.record
    try:
        sha256, vouched_by = retry_if_stale(lambda: _judge(entry.path, cached, request, report))
    except _UnexpectedError as error:  # an intact file, but not the requested one: it stays until that is downloaded
        return after_check(cached, is_damaged=False, reason=error.message), None
    except VerificationError as error:
        return after_check(cached, is_damaged=True, reason=error.message), None
    except RankloadError:
        raise
    except OSError as error:  # removed since the lookup, or the disk cannot read it any more: download a new copy
        return after_check(cached, is_damaged=False, reason=f"cannot read it: {error.strerror or error}"), None
    if not cached.problem and (record or vouched_by):  # an unreadable record may belong to another user: it stays
        adopted = Record(
            url=record.url if record else request.url.display_name,
            url_key=record.url_key if record else request.url.key,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            etag=record.etag if record else None,
            sha256=sha256,
            vouched_by=vouched_by or (record.vouched_by if record else None),
            source=record.source if record else "adopted",
            birth_ns=birth_ns(entry.path),
        )
        if record is None or (adopted != record and cached.is_trusted):
            with suppress(OSError):  # a read-only cache: the next call checks again
                write_record(entry.record_path, adopted)
    source: Provenance = "cache" if record else "adopted"
    file = FetchedFile(entry.path, status.st_size, sha256, source, is_published=is_published(cached))
    return Decision(Action.USE, "the file has passed its check"), file


def _judge(path: Path, cached: Cached, request: FetchRequest, report: Report) -> tuple[str | None, str | None]:
    """Check a file; return its digest and the source that vouches for it, both None without a digest to compare with.

    Raises:
        VerificationError: the file is damaged, or not the requested one.
    """
    assert cached.status is not None
    check_structure(path, must_be_checkpoint=request.must_be_checkpoint, origin=str(path))
    check_index(path, request, str(path))
    if not known_digest(request, cached):
        return None, None
    sha256 = _hash(path, cached.status.st_size, report)
    if cached.record and cached.record.sha256:
        check_digest(sha256, (Claim(cached.record.sha256, "its record"),), str(path))
    try:
        return sha256, check_digest(sha256, claims_of(request), str(path))
    except DigestMismatchError as error:
        raise _UnexpectedError(error.message) from None


class _UnexpectedError(VerificationError):
    """The file is not damaged, as far as is known, but it is not the requested one."""


def _hash(path: Path, size_bytes: int, report: Report) -> str:
    report(Progress("hashing", 0, size_bytes))
    return sha256_of_file(path, lambda done: report(Progress("hashing", done, size_bytes)))
