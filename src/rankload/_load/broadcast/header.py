"""The header of a broadcast, and a receiver's checks of the header. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rankload._formats.unpack_limit import unpacked_limit
from rankload._load.streams.buckets import Range

#: Largest header. A range takes about 32 bytes, so this suffices for two million storages. A source whose header would
#: be larger sends whole files instead.
MAX_HEADER_BYTES = 64 << 20

_MAX_NAME_BYTES = 255  # NAME_MAX of Linux's filesystems
_MAX_PATH_BYTES = 1024  # names are resolved below a temporary folder, and PATH_MAX is 4096


class BadHeaderError(ValueError):
    """The header of a broadcast is invalid."""


@dataclass(frozen=True)
class BroadcastHeader:
    """The source's description of a broadcast.

    Attributes:
        name: file name of the checkpoint or its index.
        display_name: name of the checkpoint in messages.
        sizes: sizes of the files in bytes, by name.
        is_whole: whether the source sends whole files, one after the other. If so, ``kept`` and ``ranges`` are empty.
        kept: byte ranges that come first, by file: headers and small storages.
        ranges: byte ranges that come after those, by file: tensors.
    """

    name: str
    display_name: str
    sizes: dict[str, int]
    is_whole: bool
    kept: dict[str, list[Range]]
    ranges: dict[str, list[Range]]

    def as_json(self) -> bytes:
        """Return the header as JSON, ready to send."""
        return json.dumps(vars(self)).encode()


def read_header(text: bytes, announced: Mapping[str, int]) -> BroadcastHeader:
    """Parse and check a received header.

    Args:
        text: received bytes.
        announced: sizes in bytes of the source's files on disk, by name, from the job's store.

    Raises:
        BadHeaderError: the header is invalid.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadHeaderError("it is not JSON") from None
    if not isinstance(value, dict) or {*value} != {*BroadcastHeader.__dataclass_fields__}:
        raise BadHeaderError("it has other fields")
    if not isinstance(value["display_name"], str) or type(value["is_whole"]) is not bool:
        raise BadHeaderError("its fields are of other types")
    sizes = _checked_sizes(value["sizes"], announced, is_whole=value["is_whole"])
    if not isinstance(value["name"], str) or value["name"] not in sizes:
        raise BadHeaderError("the checkpoint is not among its files")
    kept, ranges = (_checked_ranges(value[field], sizes) for field in ("kept", "ranges"))
    return BroadcastHeader(value["name"], value["display_name"], sizes, value["is_whole"], kept, ranges)


def check_names(names: Any) -> None:
    """Check that file names stay below their folder, and that no name is a folder of another.

    Raises:
        BadHeaderError: a name is invalid.
    """
    for name in names:
        if not isinstance(name, str) or not _is_plain(name):
            raise BadHeaderError(f"a file's name is not a plain relative path: {str(name)[:80]!r}")
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
        raise BadHeaderError("its sizes are invalid")
    if not sizes.keys() <= announced.keys():
        raise BadHeaderError("it names files that were not announced")
    check_names(sizes)
    if is_whole:
        if sizes != announced:
            raise BadHeaderError("its sizes differ from the announced ones")
    # the source unpacks a legacy archive of one file, which may then be larger than on disk
    elif any(size > unpacked_limit(announced[name]) for name, size in sizes.items()):
        raise BadHeaderError("its sizes are far beyond the announced ones")
    return sizes


def _checked_ranges(ranges: Any, sizes: Mapping[str, int]) -> dict[str, list[Range]]:
    """Return the ranges by file: sorted, disjoint, and within the file.

    Raises:
        BadHeaderError: they are not.
    """
    if not isinstance(ranges, dict) or not ranges.keys() <= sizes.keys():
        raise BadHeaderError("its ranges name files that it does not list")
    return {file: _of_one_file(of_file, sizes[file]) for file, of_file in ranges.items()}


def _of_one_file(ranges: Any, size: int) -> list[Range]:
    checked: list[Range] = []
    at = 0
    if not isinstance(ranges, list):
        raise BadHeaderError("its ranges are invalid")
    for piece in ranges:
        if not isinstance(piece, list) or len(piece) != 2 or not all(type(edge) is int for edge in piece):
            raise BadHeaderError("its ranges are invalid")
        begin, end = piece
        if not at <= begin < end <= size:
            raise BadHeaderError("its ranges overlap, or lie beyond the end of the file")
        checked.append((begin, end))
        at = end
    return checked
