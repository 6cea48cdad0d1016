"""The record of a cached file: the facts that were verified when the file was published."""

from __future__ import annotations

import errno
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rankload._cache.access import open_plain, write_own_json
from rankload._cache.files import retry_if_stale
from rankload._types import Provenance, is_sha256

_logger = logging.getLogger("rankload")

#: Largest record that is read. Records have less than 2 KiB unless a URL is long.
_MAX_BYTES = 1 << 20

_OPTIONAL_NUMBERS = ("birth_ns", "replaces_inode", "replaces_birth_ns")

#: Errors of opening a path that holds no record, or one that this user may not read. Any other error is a failure of
#: the filesystem, and proves nothing about the file's owner.
_NO_RECORDS = frozenset(
    {errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.EACCES, errno.EPERM, errno.EFBIG}
)

#: Fields that older records lack.
_LATER_FIELDS = (*_OPTIONAL_NUMBERS, "last_modified")


@dataclass(frozen=True)
class Record:
    """Facts about a published file, taken after it was written, synced and closed.

    Attributes:
        url: URL of the file, without query or credentials.
        url_key: digest that distinguishes origins (`rankload._urls.url_key`).
        size_bytes, mtime_ns, inode: stat fields of the published file; a copy or remount changes the last two.
        etag: the origin's validator; never a digest.
        sha256: hex digest of the bytes; None for an adopted file that has not been hashed yet.
        vouched_by: source of the expected digest: ``sha256`` (the argument), ``hash_prefix`` (the file name),
            ``sidecar``, or the response header's name in lower case; None if there was no expected digest.
        source: ``download``, or ``adopted`` for a file that torch.hub left.
        last_modified: the origin's other validator. Older records lack it.
        birth_ns: creation time of the file, in nanoseconds; None if unknown. Older records lack it.
        replaces_inode, replaces_birth_ns: inode and creation time of the older file of rankload's that this one
            replaces. The older file is still in place if the process was killed after it wrote this record.
    """

    url: str
    url_key: str
    size_bytes: int
    mtime_ns: int
    inode: int
    etag: str | None
    sha256: str | None
    vouched_by: str | None
    source: Provenance
    last_modified: str | None = None
    birth_ns: int | None = None
    replaces_inode: int | None = None
    replaces_birth_ns: int | None = None

    def vouches_for(self, status: os.stat_result) -> bool:
        """Return whether a stat result matches the published file."""
        return (self.size_bytes, self.mtime_ns, self.inode) == (
            status.st_size,
            status.st_mtime_ns,
            status.st_ino,
        )


@dataclass(frozen=True)
class FoundRecord:
    """The result of reading a record's path.

    Attributes:
        record: the record; None if it is unreadable, malformed, or of another version.
        owner_uid: user id of the record's owner; None if unknown.
        problem: why ``record`` is None; else empty.
    """

    record: Record | None
    owner_uid: int | None
    problem: str = ""


def find_record(path: Path) -> FoundRecord | None:
    """Read a record. Return None only if the path does not exist: an unreadable record still shows an owner.

    Raises:
        OSError: the filesystem fails.
    """
    owner_uid = None
    try:
        text, owner_uid = retry_if_stale(lambda: _text_of(path))
        found = json.loads(text)
        names = [field.name for field in fields(Record) if field.name in found or field.name not in _LATER_FIELDS]
        record = Record(**{name: found[name] for name in names})
        return FoundRecord(_checked(record), owner_uid)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _NO_RECORDS:
            raise
        return _unreadable(path, owner_uid, error)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return _unreadable(path, owner_uid, error)


def _unreadable(path: Path, owner_uid: int | None, error: Exception) -> FoundRecord:
    why = getattr(error, "strerror", None) or type(error).__name__
    _logger.warning("unreadable record %s (%s)", path, why)
    return FoundRecord(None, owner_uid, f"its record {path} is unreadable ({why})")


def is_on_record(directory: Path, status: os.stat_result) -> bool:
    """Return whether any record in a directory describes a file, whatever the file's name.

    On some filesystems, names that differ in case, accents or trailing dots are one file. Inode numbers are not
    compared: some of these filesystems renumber inodes at each mount.
    """
    facts = (status.st_size, status.st_mtime_ns)
    for path in directory.glob("*.json"):
        with suppress(OSError):
            found = find_record(path)
            if found and found.record and (found.record.size_bytes, found.record.mtime_ns) == facts:
                return True
    return False


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically.

    Raises:
        CacheError: something else is in the place of the record's directory.
        OSError: the record cannot be written.
    """
    write_own_json(path, asdict(record))


def _text_of(path: Path) -> tuple[str, int]:
    with os.fdopen(open_plain(path), encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        if status.st_size > _MAX_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return file.read(), status.st_uid


def _checked(record: Record) -> Record:
    """Return the record if all fields have the right types.

    Raises:
        TypeError: a field has another type.
        ValueError: the digest is none: a message would show it, whoever wrote it.
    """
    for name in ("size_bytes", "mtime_ns", "inode"):
        if type(getattr(record, name)) is not int:
            raise TypeError(f"{name} is not a number")
    for name in _OPTIONAL_NUMBERS:
        if type(getattr(record, name)) not in (int, type(None)):
            raise TypeError(f"{name} is not a number")
    for name in ("url", "url_key", "etag", "last_modified", "sha256", "vouched_by", "source"):
        is_optional = name in ("etag", "last_modified", "sha256", "vouched_by")
        if not isinstance(value := getattr(record, name), str) and not (is_optional and value is None):
            raise TypeError(f"{name} is not a string")
    if record.sha256 is not None and not is_sha256(record.sha256):
        raise ValueError("sha256 is no digest")
    return record
