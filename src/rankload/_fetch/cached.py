"""A look into the cache: whose the file is that lies there, and whether it can be used."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISLNK, S_ISREG

from rankload._cache.access import make_own_directory
from rankload._cache.failures import reading, reopening
from rankload._cache.layout import Entry
from rankload._cache.quarantine import quarantine
from rankload._cache.record import Record, read_record, write_record
from rankload._checkpoint.open import check_structure
from rankload._errors import CacheError, DigestMismatchError, RankloadError, VerificationError
from rankload._fetch.digest import sha256_of_file
from rankload._fetch.origins.origin import Claim
from rankload._fetch.plan import Action, Cached, decide, known_digest
from rankload._fetch.verify import check_digest, claims_of
from rankload._types import FetchedFile, FetchRequest, Progress, Report
from rankload._urls import redact, url_key

_logger = logging.getLogger("rankload")

FileVersion = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """What a look into the cache has found.

    Attributes:
        entry: the one that is the request's.
        version: of the file that was there, None for none: it changes when somebody publishes.
        file: that file, if it can be used.
        damage: what is wrong with it, if that is known and it should be set aside.
        reason: why it cannot be used.
    """

    entry: Entry
    version: FileVersion | None
    file: FetchedFile | None = None
    damage: str | None = None
    reason: str = ""


def look_up(entry: Entry, request: FetchRequest, report: Report) -> Look:
    """Find the entry that is the request's, and whether its file can be used. Changes nothing but records.

    Raises:
        CacheError: something else lies in the file's place, or it cannot be read.
    """
    cached = _inspect(entry)
    plan = decide(request, cached)
    _logger.debug("%s: %s (%s)", entry.path, plan.action.name, plan.reason)
    if plan.action is Action.SEPARATE:
        separate = entry.separate(request.urls[0])
        _logger.warning("%s: %s; keeping %s at %s", entry.path, plan.reason, redact(request.urls[0]), separate.path)
        make_entry_directory(separate)
        return look_up(separate, request, report)
    version = _version_of(cached.status)
    if plan.action is Action.USE:
        assert cached.status is not None
        sha256 = cached.record.sha256 if cached.record else None
        return Look(entry, version, FetchedFile(entry.path, cached.status.st_size, sha256, "cache"))
    if plan.action is Action.REPLACE:
        return Look(entry, version, damage=plan.reason, reason=plan.reason)
    if plan.action is Action.CHECK:
        try:
            file = _checked(entry, cached, request, report)
            return Look(entry, version, file, reason="it is not what is asked for, or cannot be read")
        except VerificationError as error:
            return Look(entry, version, damage=error.message, reason=error.message)
    return Look(entry, version, reason=plan.reason)


def use_in_place(path: Path, request: FetchRequest, report: Report) -> FetchedFile:
    """Check a file that is not the cache's; it stays where it is.

    Raises:
        VerificationError: it is not what it should be.
        CacheError: it cannot be read.
    """
    with reading(path):
        return reopening(lambda: _in_place(path, request, report))


def file_version(entry: Entry) -> FileVersion | None:
    """Return what changes when somebody publishes the entry's file; None where there is none."""
    try:
        return _version_of(entry.path.stat())
    except OSError:
        return None


def is_anothers(entry: Entry, request: FetchRequest) -> bool:
    """Tell whether another URL's file lies there."""
    return decide(request, _inspect(entry)).action is Action.SEPARATE


def set_damaged_file_aside(look: Look) -> None:
    """Set the file aside that a look has found damaged.

    Only under the lease and while it is still that file, or the good one that another job has published would go.
    """
    if look.damage is not None:
        path = quarantine(look.entry, look.damage, look.entry.path.replace)
        kept = f" (kept at {path})" if path else ""
        _logger.warning("%s: %s%s; fetching it again", look.entry.path, look.damage, kept)


def make_entry_directory(entry: Entry) -> None:
    """Make the directories of rankload's own down to an entry's.

    Raises:
        CacheError: one of them cannot be made, or is a symbolic link.
    """
    for directory in entry.own_directories:
        try:
            make_own_directory(directory)
        except CacheError:
            raise
        except OSError as error:
            raise CacheError(
                f"cannot make {directory}: {error.strerror}", path=str(directory), errno=error.errno
            ) from error


def _in_place(path: Path, request: FetchRequest, report: Report) -> FetchedFile:
    status = path.stat()
    if not S_ISREG(status.st_mode):  # opening a pipe would wait for its writer, for ever
        raise CacheError(f"cannot read {path}: it is no regular file", path=str(path))
    check_structure(path, must_be_checkpoint=request.must_be_checkpoint, origin=str(path))
    sha256, claims = None, claims_of(request)
    if claims:
        sha256 = _hash(path, status.st_size, report)
        check_digest(sha256, claims, str(path))
    return FetchedFile(path, status.st_size, sha256, "local")


def _version_of(status: os.stat_result | None) -> FileVersion | None:
    return None if status is None else (status.st_ino, status.st_mtime_ns)


def _inspect(entry: Entry) -> Cached:
    own_directory = entry.record_path.parent
    if own_directory.is_symlink():
        raise CacheError(f"{own_directory} is a symbolic link: refused; remove it", path=str(own_directory))
    with reading(entry.path):
        try:
            link, status = reopening(lambda: (entry.path.lstat(), entry.path.stat()))
        except FileNotFoundError:
            return Cached(None, None)
    if S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):
        raise CacheError(
            f"{entry.path} is another user's symbolic link: refused; remove it or pass file_name=", path=str(entry.path)
        )
    if not S_ISREG(status.st_mode):
        raise CacheError(f"{entry.path} is no file; remove it or pass file_name=", path=str(entry.path))
    return Cached(status, read_record(entry.record_path))


def _checked(entry: Entry, cached: Cached, request: FetchRequest, report: Report) -> FetchedFile | None:
    """Check a file that no record vouches for, and adopt it; None if it is not what is asked for now.

    Raises:
        VerificationError: it is damaged.
    """
    assert cached.status is not None
    status, record = cached.status, cached.record
    try:
        sha256, vouched_by = reopening(lambda: _judge(entry.path, cached, request, report))
    except _UnexpectedError as error:  # whole, but not what is asked for now: it stays until that is there
        _logger.warning("%s; fetching it again", error)
        return None
    except RankloadError:
        raise
    except OSError as error:  # removed since the look, or the disk cannot read it any more: a new copy helps
        _logger.warning("cannot read %s: %s; fetching it again", entry.path, error.strerror or error)
        return None
    adopted = Record(
        url=record.url if record else redact(request.urls[0]),
        url_key=record.url_key if record else url_key(request.urls[0]),
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        etag=record.etag if record else None,
        sha256=sha256,
        vouched_by=vouched_by or (record.vouched_by if record else None),
        source=record.source if record else "adopted",
    )
    if adopted != record:
        write_record(entry.record_path, adopted)
    return FetchedFile(entry.path, status.st_size, sha256, "cache" if record else "adopted")


def _judge(path: Path, cached: Cached, request: FetchRequest, report: Report) -> tuple[str | None, str | None]:
    """Return the digest, where one is known to compare with, and whose vouches for it."""
    assert cached.status is not None
    check_structure(path, must_be_checkpoint=request.must_be_checkpoint, origin=str(path))
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
    """The file is not damaged, as far as anybody knows; it is not the one that is asked for."""


def _hash(path: Path, size_bytes: int, report: Report) -> str:
    report(Progress("hashing", 0, size_bytes))
    return sha256_of_file(path, lambda done: report(Progress("hashing", done, size_bytes)))
