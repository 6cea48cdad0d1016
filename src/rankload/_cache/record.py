"""The record of a cached file: what was verified when it was published, so that nobody has to hash it again."""

from __future__ import annotations

import json
import logging
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rankload._cache.access import make_own_directory, open_plain, share_file
from rankload._cache.failures import reopening
from rankload._types import Source

_logger = logging.getLogger("rankload")


@dataclass(frozen=True)
class Record:
    """Facts about a published file, taken after it was written, synced and closed.

    Attributes:
        url: where it came from, without query or credentials.
        url_key: tells origins apart (see `layout.url_key`).
        size_bytes, mtime_ns, inode: of the file as published; a copy or remount changes the last two.
        etag: the origin's validator; never a digest.
        sha256: hex digest of the bytes; None for an adopted file that nobody has hashed yet.
        vouched_by: whose digest the bytes were compared with: ``sha256`` (the argument), ``hash_prefix`` (the file
            name), ``sidecar``, the response header's name in lower case, or None for nobody's.
        source: ``download``, or ``adopted`` for a file that torch.hub left.
    """

    url: str
    url_key: str
    size_bytes: int
    mtime_ns: int
    inode: int
    etag: str | None
    sha256: str | None
    vouched_by: str | None
    source: Source

    def vouches_for(self, status: os.stat_result) -> bool:
        """Tell whether the file is still the one that was published, as far as stat can tell."""
        return (self.size_bytes, self.mtime_ns, self.inode) == (
            status.st_size,
            status.st_mtime_ns,
            status.st_ino,
        )


def read_record(path: Path) -> Record | None:
    """Read a record; None where there is none, or one that is unreadable or of another version."""
    try:
        found = json.loads(reopening(lambda: _text_of(path)))
        return _checked(Record(**{field.name: found[field.name] for field in fields(Record)}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _logger.warning("ignoring the unreadable record %s: %s", path, error)
        return None


def write_record(path: Path, record: Record) -> bool:
    """Write a record atomically; tell whether it was. In a read-only cache it is not: the next call looks again."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        make_own_directory(path.parent)
        with temporary.open("x", encoding="utf-8") as file:
            share_file(file.fileno(), path.parent)
            file.write(json.dumps(asdict(record), indent=1) + "\n")
        temporary.replace(path)
        return True
    except OSError as error:
        _logger.debug("no record written at %s: %s", path, error)
        return False
    finally:
        with suppress(OSError):
            temporary.unlink()  # there only if something went wrong, be it a signal


def _text_of(path: Path) -> str:
    with os.fdopen(open_plain(path), encoding="utf-8") as file:
        return file.read()


def _checked(record: Record) -> Record:
    """Return the record, unless somebody wrote something else into one of its fields."""
    for name in ("size_bytes", "mtime_ns", "inode"):
        if type(getattr(record, name)) is not int:
            raise TypeError(f"{name} is no number")
    for name in ("url", "url_key", "etag", "sha256", "vouched_by", "source"):
        is_optional = name in ("etag", "sha256", "vouched_by")
        if not isinstance(value := getattr(record, name), str) and not (is_optional and value is None):
            raise TypeError(f"{name} is no text")
    return record
