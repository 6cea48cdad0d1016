"""The journal beside a partial file: which version it belongs to, and which ranges are there.

One line of JSON that describes the content, then one line per event, each appended with a single write:

- ``[begin, end]``: the range is written. Processes of the same boot see it; a crash of the machine may undo it.
- ``{"synced": n}``: the first n ranges are on disk. Its time of modification is also the owner's sign of life.

A last line that was cut off is ignored.
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

#: A download of 10 TB has written so much.
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class PartialContent:
    """What a partial file is the beginning of.

    Attributes:
        url_key: of the URL that it came from.
        size_bytes: of the whole file.
        etag, last_modified: the origin's validators.
        sha256: the digest that was expected, None for none.
    """

    url_key: str
    size_bytes: int
    etag: str | None
    last_modified: str | None
    sha256: str | None

    @property
    def version(self) -> Version:
        """The same as an origin would say it."""
        return Version(self.size_bytes, self.etag, self.last_modified)


@dataclass(frozen=True)
class Entries:
    """A journal as it was read: the content, the ranges that it lists, and when it was last written to."""

    content: PartialContent
    spans: ByteRanges
    modified_at: float


def journal_path(partial_path: Path) -> Path:
    """Return the path of a partial file's journal."""
    return partial_path.with_name(partial_path.name + _SUFFIX)


def beginning_path(partial_path: Path) -> Path:
    """Return the path of a partial file's journal until that is complete."""
    return partial_path.with_name(partial_path.name + _SUFFIX + _BEGINNING)


def partial_path_of(path: Path) -> Path | None:
    """Return the partial file's path for that of a journal, or of the beginning of one; None for any other file's."""
    name = path.name.removesuffix(_BEGINNING)
    return path.with_name(name.removesuffix(_SUFFIX)) if name.endswith(_SUFFIX) else None


class Journal:
    """An open journal of one's own. Losing a line, or the whole of it, costs bandwidth only: no failure is raised."""

    def __init__(self, partial_path: Path, content: PartialContent, spans: Iterable[tuple[int, int]] = ()) -> None:
        self.content = content
        self._path, self._descriptor, self._count = journal_path(partial_path), -1, 0
        self._lock = threading.Lock()  # the n in "the first n ranges" must be the order of the lines
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        # the one that was adopted holds until this one is complete
        beginning = beginning_path(partial_path)
        with suppress(OSError):
            self._descriptor = os.open(beginning, flags, NEW_FILE_MODE)
            share_file(self._descriptor, self._path.parent)
            self._append({"journal": _FORMAT, "boot": boot_id(), **asdict(content)}, *([*span] for span in spans))
            beginning.replace(self._path)

    def add(self, begin: int, end: int) -> None:
        """Note that a range was written."""
        self._append([begin, end])

    def synced(self, count: int) -> None:
        """Note that the first ranges, so many, are on disk; and that this process lives."""
        self._append({"synced": count})
        with self._lock, suppress(OSError):
            if self._descriptor >= 0:  # or it could not be made, or is closed
                os.fdatasync(self._descriptor)

    @property
    def count(self) -> int:
        """Number of ranges noted."""
        return self._count

    def close(self) -> None:
        """Let go of it."""
        with self._lock, suppress(OSError):
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _append(self, *lines: Any) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self._lock, suppress(OSError):  # closed, or the disk is full
            os.write(self._descriptor, text.encode())
            self._count += sum(isinstance(line, list) for line in lines)


def read_journal(partial_path: Path) -> Entries | None:
    """Read the journal of a dead process's partial file; None where there is none that can be used.

    Another user's cannot: it could list what was never written, and be as long as its owner likes.
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
    """Return when a journal was last written to, whoever has written it; None where there is none that can be read."""
    try:
        descriptor = open_plain(journal_path(partial_path))  # which makes a network filesystem ask its server
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
