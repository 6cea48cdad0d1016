"""What a cache directory holds: published files with their records, and checkpoints in several files as one item."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from rankload._cache.access import is_trusted
from rankload._cache.layout import Entry
from rankload._cache.record import FoundRecord, Record, find_record
from rankload._urls import OF_A_PARTIAL_FILE, OWN_DIRECTORY, is_own_name

#: Folders below rankload's own directory that hold files of other URLs with the same name (`Entry.separate`).
_SEPARATE = re.compile("[0-9a-f]{16}")

#: Name of a partial file, or of its journal.
_PARTIAL = re.compile(rf".*{OF_A_PARTIAL_FILE.pattern}(?:\.journal(?:\.new)?)?", re.DOTALL)

#: End of the name of an index's folder (`name_in_own_folder`).
_INDEX_FOLDER = re.compile(r".+-[0-9a-f]{16}", re.DOTALL)


@dataclass(frozen=True)
class CachedItem:
    """A published file, or a checkpoint in several files: what is listed and removed as one.

    Attributes:
        name: path below the cache directory.
        path: path of the file; of a checkpoint in several files, of its folder.
        root: the cache directory.
        entries: cache entries of all files.
        record: record of the file, or of the index.
        size_bytes: bytes of all files.
        used_at: when a file was last written or read, in seconds since the epoch. Many filesystems note the reading of
            a file once a day.
    """

    name: str
    path: Path
    root: Path
    entries: tuple[Entry, ...]
    record: Record
    size_bytes: int
    used_at: float

    @property
    def identities(self) -> frozenset[tuple[int, int]]:
        """Device and inode number of all files."""
        found = set()
        for entry in self.entries:
            with suppress(OSError):
                status = entry.path.stat()
                found.add((status.st_dev, status.st_ino))
        return frozenset(found)


def list_items(directory: Path) -> Iterator[CachedItem]:
    """Yield what rankload has published in a cache directory.

    Files without a record are not rankload's, nor are those of torch.hub or the user that it has adopted.

    Raises:
        OSError: the directory cannot be read.
    """
    yield from _items_in(directory, directory)
    for name in sorted(_names_in(directory / OWN_DIRECTORY, directory)):
        if _SEPARATE.fullmatch(name):
            yield from _items_in(directory / OWN_DIRECTORY / name, directory)


def leftovers(directory: Path) -> Iterator[Path]:
    """Yield quarantined files, their notes, and all partial files, of a cache directory and the folders in it."""
    names = _names_in(directory, directory)
    for folder in (directory, *(directory / name for name in names if not is_own_name(name))):
        quarantine = folder / OWN_DIRECTORY / "quarantine"
        for name in sorted(_names_in(quarantine, directory)):
            yield quarantine / name
        for name in sorted(_names_in(folder, directory)):
            if _PARTIAL.fullmatch(name):
                yield folder / name


def remove_item(item: CachedItem) -> int:
    """Remove an item's files, each before its record, and return the bytes. Who has a file mapped keeps it.

    A file without its record could be taken for one of torch.hub's; a record without its file means nothing.

    Raises:
        OSError: a file cannot be removed.
    """
    for entry in item.entries:
        for path in (entry.path, entry.record_path):
            remove_file(path, item.root)
    if item.path not in (entry.path for entry in item.entries):  # a folder, with nothing but leases in it by now
        with suppress(OSError):
            remove_file(item.path / OWN_DIRECTORY / "partly-renewed", item.root)
            (item.path / OWN_DIRECTORY).rmdir()
            item.path.rmdir()
    return item.size_bytes


def remove_file(path: Path, root: Path) -> None:
    """Remove a file of a cache directory, if it is there. No link below the directory is followed.

    Another user may have replaced a folder by a link since the directory was listed.

    Raises:
        OSError: the file cannot be removed, or there is a link in its path.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with ExitStack() as closing, suppress(FileNotFoundError):
        folder = os.open(root, flags)
        closing.callback(os.close, folder)
        for name in path.parent.relative_to(root).parts:
            folder = os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
            closing.callback(os.close, folder)
        os.unlink(path.name, dir_fd=folder)


def mapped_files() -> frozenset[tuple[int, int]]:
    """Return device and inode number of all files that processes of this host have mapped, as far as this user sees."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[4] != "0":
                    major, minor = fields[3].split(":")
                    found.add((os.makedev(int(major, 16), int(minor, 16)), int(fields[4])))
    return frozenset(found)


def _items_in(directory: Path, root: Path) -> Iterator[CachedItem]:
    for name in sorted(_names_in(directory, root)):
        path = directory / name
        if is_own_name(name):
            continue
        if _INDEX_FOLDER.fullmatch(name) and path.is_dir():
            yield from _index_in(path, root)
        elif (item := _item(path, [path], path, root)) is not None:
            yield item


def _index_in(folder: Path, root: Path) -> Iterator[CachedItem]:
    paths = [folder / name for name in sorted(_names_in(folder, root)) if not is_own_name(name)]
    indexes = [path for path in paths if ".index." in path.name]
    if len(indexes) == 1:
        item = _item(indexes[0], paths, folder, root)
        if item is not None:
            yield item


def _item(path: Path, paths: list[Path], place: Path, root: Path) -> CachedItem | None:
    """Return the item of a file with a record that describes it, and of the files that belong to it.

    Args:
        path: path of the file, or of the index.
        paths: paths of all files.
        place: path of the file, or of the index's folder.
        root: the cache directory.
    """
    entries, size_bytes, used_at = [], 0, 0.0
    for one in paths:
        entry = Entry(one)
        with suppress(OSError):
            status, found = one.lstat(), find_record(entry.record_path)
            if S_ISREG(status.st_mode) and found is not None and _is_of_a_download(found, status):
                entries.append(entry)
                size_bytes += status.st_size
                used_at = max(used_at, status.st_mtime, status.st_atime)
    first = find_record(Entry(path).record_path) if Entry(path) in entries else None
    if first is None or first.record is None:
        return None
    return CachedItem(str(place.relative_to(root)), place, root, tuple(entries), first.record, size_bytes, used_at)


def _is_of_a_download(found: FoundRecord, status: os.stat_result) -> bool:
    """Return whether a record shows that rankload has published a file. Another user's could name any file."""
    is_own = found.owner_uid is not None and is_trusted(found.owner_uid)
    record = found.record
    return is_own and record is not None and record.source == "download" and record.vouches_for(status)


def _names_in(folder: Path, root: Path) -> list[str]:
    """Return the names in a folder of a cache directory; none where there is no folder, or a link leads to it.

    A link may be another user's, and lead to files that are not rankload's.
    """
    names = folder.relative_to(root).parts
    if any(root.joinpath(*names[: count + 1]).is_symlink() for count in range(len(names))):
        return []
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
