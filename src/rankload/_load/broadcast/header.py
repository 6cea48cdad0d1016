"""The header of a broadcast, and the checks before a receiver acts on it. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rankload._formats.unpack_limit import unpacked_limit
from rankload._load.streams.buckets import Range

#: Bytes of a description. A range takes about 32 of them, so this suffices for a million storages twice over; a source
#: whose description would be longer sends whole files instead.
MAX_HEADER_BYTES = 64 << 20

_MAX_NAME_BYTES = 255  # NAME_MAX of Linux's filesystems
_MAX_PATH_BYTES = 1024  # names are looked up below a temporary folder, and PATH_MAX is 4096


class BadHeaderError(ValueError):
    """A description that cannot be right."""


@dataclass(frozen=True)
class BroadcastHeader:
    """The description.

    Attributes:
        name: of the checkpoint among its files.
        display_name: what messages call it.
        sizes: of the files in bytes, by name.
        is_whole: whether the files come whole, one after the other; if not:
        kept: which ranges of them come first, by file.
        ranges: which come after those.
    """

    name: str
    display_name: str
    sizes: dict[str, int]
    is_whole: bool
    kept: dict[str, list[Range]]
    ranges: dict[str, list[Range]]

    def as_json(self) -> bytes:
        """Return what is sent."""
        return json.dumps(vars(self)).encode()


def read_header(text: bytes, announced: Mapping[str, int]) -> BroadcastHeader:
    """Return the description in a text.

    Args:
        text: as it came.
        announced: sizes in bytes of the source's files on disk, by name, as the job's store has them.

    Raises:
        BadHeaderError: it cannot be right.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadHeaderError("it is no JSON") from None
    if not isinstance(value, dict) or {*value} != {*BroadcastHeader.__dataclass_fields__}:
        raise BadHeaderError("it has other fields")
    if not isinstance(value["display_name"], str) or type(value["is_whole"]) is not bool:
        raise BadHeaderError("its fields are of other types")
    sizes = _checked_sizes(value["sizes"], announced, is_whole=value["is_whole"])
    if not isinstance(value["name"], str) or value["name"] not in sizes:
        raise BadHeaderError("the checkpoint is none of its files")
    kept, ranges = (_checked_ranges(value[field], sizes) for field in ("kept", "ranges"))
    return BroadcastHeader(value["name"], value["display_name"], sizes, value["is_whole"], kept, ranges)


def check_names(names: Any) -> None:
    """Check that names of files stay below the folder that they are looked up in, and apart from each other.

    Raises:
        BadHeaderError: one does not.
    """
    for name in names:
        if not isinstance(name, str) or not _is_plain(name):
            raise BadHeaderError(f"a file's name is no plain relative one: {str(name)[:80]!r}")
        if any(str(parent) in names for parent in PurePosixPath(name).parents):
            raise BadHeaderError(f"a file lies below another one: {name[:80]!r}")


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    try:
        encoded = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return (
        bool(encoded)
        and str(path) == name  # no "./a", "a//b" or "a/"
        and not path.is_absolute()
        and ".." not in path.parts
        and not any(character in name for character in "\0\\")
        and max(map(len, encoded)) <= _MAX_NAME_BYTES
        and sum(len(part) + 1 for part in encoded) <= _MAX_PATH_BYTES
    )


def _checked_sizes(sizes: Any, announced: Mapping[str, int], *, is_whole: bool) -> dict[str, int]:
    if not isinstance(sizes, dict) or not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise BadHeaderError("its sizes are no sizes")
    if not sizes.keys() <= announced.keys():
        raise BadHeaderError("it names files that were not announced")
    check_names(sizes)
    if is_whole:
        if sizes != announced:
            raise BadHeaderError("its sizes are not the announced ones")
    # a legacy archive of one file is unpacked at the source, and may be larger than on disk
    elif any(size > unpacked_limit(announced[name]) for name, size in sizes.items()):
        raise BadHeaderError("its sizes are far beyond the announced ones")
    return sizes


def _checked_ranges(ranges: Any, sizes: Mapping[str, int]) -> dict[str, list[Range]]:
    """Return ranges by file, sorted, apart, and within the file."""
    if not isinstance(ranges, dict) or not ranges.keys() <= sizes.keys():
        raise BadHeaderError("its ranges are of other files")
    return {file: _of_one_file(of_file, sizes[file]) for file, of_file in ranges.items()}


def _of_one_file(ranges: Any, size: int) -> list[Range]:
    checked: list[Range] = []
    at = 0
    if not isinstance(ranges, list):
        raise BadHeaderError("its ranges are no ranges")
    for piece in ranges:
        if not isinstance(piece, list) or len(piece) != 2 or not all(type(edge) is int for edge in piece):
            raise BadHeaderError("its ranges are no ranges")
        begin, end = piece
        if not at <= begin < end <= size:
            raise BadHeaderError("its ranges overlap, or lie beyond the end of the file")
        checked.append((begin, end))
        at = end
    return checked
