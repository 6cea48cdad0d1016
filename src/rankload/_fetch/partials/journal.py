"""The journal beside a partial file: the file's version, and the ranges that are written.

The first line is JSON that describes the content. One line per event follows, each appended with a single write:

- ``[begin, end]``: the range is written. Processes of the same boot see it; a crash of the machine may undo it.
- ``{"synced": n}``: the first n ranges are on disk. By the journal's mtime, this also shows that the owner is alive.

A truncated last line is ignored.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankload._cache.access import NEW_FILE_MODE, open_plain, share_file
from rankload._fetch.origins.origin import Version
from rankload._fetch.partials.owner import boot_id
from rankload._platform.byte_ranges import ByteRanges

_FORMAT = 1

_SUFFIX, _BEGINNING = ".journal", ".new"

#: Largest journal to read: that of a download of 10 TB.
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class PartialContent:
    """The whole content to which a partial file belongs.

    Attributes:
        url_key: key of the URL that the bytes came from.
        size_bytes: size of the whole file.
        etag, last_modified: validators of the origin.
        sha256: expected digest, or its first digits; None if none was expected.
    """

    url_key: str
    size_bytes: int
    etag: str | None
    last_modified: str | None
    sha256: str | None

    @property
    def version(self) -> Version:
        """The content as an origin's version."""
        return Version(self.size_bytes, self.etag, self.last_modified)


@dataclass(frozen=True)
class Entries:
    """A journal's content, the ranges that it lists, and the time when it was last written to."""

    content: PartialContent
    spans: ByteRanges
    modified_at: float


def journal_path(partial_path: Path) -> Path:
    """Return the path of a partial file's journal."""
    return partial_path.with_name(partial_path.name + _SUFFIX)


def beginning_path(partial_path: Path) -> Path:
    """Return the path of a partial file's journal until its beginning is complete."""
    return partial_path.with_name(partial_path.name + _SUFFIX + _BEGINNING)


def partial_path_of(path: Path) -> Path | None:
    """Return the path of the partial file for the path of a journal, complete or not; None for other files."""
    name = path.name.removesuffix(_BEGINNING)
    return path.with_name(name.removesuffix(_SUFFIX)) if name.endswith(_SUFFIX) else None


class Journal:
    """This process's open journal. It raises no errors: a lost line, or journal, costs only bandwidth."""

    def __init__(self, partial_path: Path, content: PartialContent, spans: Iterable[tuple[int, int]] = ()) -> None:
        self.content = content
        self._path, self._descriptor, self._count = journal_path(partial_path), -1, 0
        self._lock = threading.Lock()  # keeps the count in step with the order of the lines, for "the first n ranges"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        # an adopted journal stays valid until this one is complete
        beginning = beginning_path(partial_path)
        with suppress(OSError):
            self._descriptor = os.open(beginning, flags, NEW_FILE_MODE)
            share_file(self._descriptor, self._path.parent)
            self._append({"journal": _FORMAT, "boot": boot_id(), **asdict(content)}, *([*span] for span in spans))
            beginning.replace(self._path)

    def add(self, begin: int, end: int) -> None:
        """Record that a range was written."""
        self._append([begin, end])

    def synced(self, count: int) -> None:
        """Record that the first ``count`` ranges are on disk, and that this process is alive."""
        self._append({"synced": count})
        with self._lock, suppress(OSError):
            if self._descriptor >= 0:  # else the journal could not be made, or is closed
                os.fdatasync(self._descriptor)

    @property
    def count(self) -> int:
        """Number of recorded ranges."""
        return self._count

    def close(self) -> None:
        """Close the journal."""
        with self._lock, suppress(OSError):
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _append(self, *lines: Any) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self._lock, suppress(OSError):  # closed, or the disk is full
            os.write(self._descriptor, text.encode())
            self._count += sum(isinstance(line, list) for line in lines)


def read_journal(partial_path: Path) -> Entries | None:
    """Read the journal of a dead process's partial file; None if there is no usable one.

    Another user's journal is not usable: it could list ranges that were never written, and have any length.
    """
    try:
        with os.fdopen(open_plain(journal_path(partial_path)), "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_size > _MAX_BYTES:
                return None
            lines = file.read().splitlines(keepends=True)
        head = json.loads(lines[0])
        if head.pop("journal") != _FORMAT:
            return None
        is_same_boot = head.pop("boot") == boot_id() != ""
        content = _checked(PartialContent(**head))
        ranges, synced = _events(lines[1:])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    kept = ranges if is_same_boot else ranges[:synced]
    spans = ByteRanges((begin, end) for begin, end in kept if 0 <= begin < end <= content.size_bytes)
    return Entries(content, spans, status.st_mtime)


def last_beat(partial_path: Path) -> float | None:
    """Return the time when any user's journal was last written to; None if there is no readable one."""
    try:
        descriptor = open_plain(journal_path(partial_path))  # opening makes a network filesystem ask its server
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _events(lines: list[bytes]) -> tuple[list[tuple[int, int]], int]:
    ranges, synced = [], 0
    for line in lines:
        try:
            event = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            break
        match event:
            case [int(begin), int(end)]:
                ranges.append((begin, end))
            case {"synced": int(count)} if count >= 0:
                synced = count
            case _:
                break
    return ranges, synced


def _checked(content: PartialContent) -> PartialContent:
    texts = (content.etag, content.last_modified, content.sha256)
    has_key = type(content.size_bytes) is int and isinstance(content.url_key, str)
    if not has_key or not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError("no journal of ours")
    return content
