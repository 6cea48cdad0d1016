"""Read the index of torch's zip format: its pickle, and the position of each storage's record."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from rankload._formats import zip_archive as torch_zip
from rankload._formats.broken import BrokenFileError
from rankload._formats.entry import ITEM_BYTES, StorageEntry
from rankload._formats.index import ByteOrder, FileIndex
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.pickle_vm import PickleMachine
from rankload._formats.source import Source
from rankload._formats.torch_objects import BUILDERS, EXACT_BUILDERS, storage_type_of
from rankload._formats.zip_members import check_listing

#: Latest version of the format. torch.save writes 3; later versions are TorchScript's.
_LATEST_VERSION = 10

#: Allowed storage keys; torch.save's are numbers. For a key of these characters torch's reader finds the same member.
_KEY = re.compile(r"[0-9A-Za-z_.-]+", re.ASCII)
_MAX_KEY_LENGTH = 1000


def read_zip_index(source: Source, file: str, *, is_remote: bool, exactly: bool = False) -> FileIndex:
    """Read the index of a zip file.

    Args:
        source: the file.
        file: name of the file, for the entries.
        is_remote: whether each read costs a round trip. If so, payload positions are inferred from the directory. Only
            the first and the last are looked up at once, the others before they are read.
        exactly: build only tensors that equal torch.load's; all others stay `Unbuilt`.

    Raises:
        BrokenFileError: the file contradicts its format.
        NotUnderstoodError: only torch.load can read the file.
    """
    directory = torch_zip.read_directory(source)
    if directory.kind != "torch_zip":
        raise NotUnderstoodError(f"a zip archive of the kind {directory.kind}")
    check_listing(directory, source.size_bytes)
    members = _members_as_torch_sees_them(directory)
    records = _Records(source, directory, members, file, is_remote=is_remote)
    pickled = torch_zip.member_content(source, directory, members[directory.raw_root + b"/data.pkl"])
    machine = PickleMachine(pickled, EXACT_BUILDERS if exactly else BUILDERS, records.storage)
    content = machine.next_pickle()
    member = members.get(directory.raw_root + b"/byteorder")  # since torch 2.1
    order = None if member is None else _byte_order(torch_zip.member_content(source, directory, member))
    is_exact = machine.is_exact and _has_known_version(source, directory, members)
    return FileIndex(content, order, is_exact, tuple(records.storages.values()), records.confirm)


def check_script(source: Source) -> set[str]:
    """Compare every storage in the pickles of a TorchScript archive with its record. Return the location tags.

    torch.jit.load compares nothing: for a record that is too short, it loads the memory after the record as weights.

    Raises:
        BrokenFileError: a storage is longer than its record, or a tensor than its storage.
        NotUnderstoodError: the archive cannot be checked.
    """
    directory = torch_zip.read_directory(source)
    members = _members_as_torch_sees_them(directory)
    tags: set[str] = set()
    for folder in ("data", "constants"):
        pickled = members.get(directory.raw_root + f"/{folder}.pkl".encode("ascii"))
        if pickled is not None:
            records = _Records(source, directory, members, "", folder=folder, is_remote=False)
            content = torch_zip.member_content(source, directory, pickled)
            PickleMachine(content, BUILDERS, records.storage).next_pickle()
            tags.update(storage.location for storage in records.storages.values())
    return tags


def _members_as_torch_sees_them(directory: torch_zip.Directory) -> dict[bytes, torch_zip.Member]:
    """Return the members by their raw names, if torch's reader cannot confuse two names.

    torch's reader ignores case, and compares only up to a NUL (mz_zip_reader_locate_file). If it found another member,
    torch.load would map bytes that were not checked.

    Raises:
        NotUnderstoodError: torch's reader could confuse two names.
    """
    members = {member.raw_name: member for member in directory.members}
    are_unique = len({name.lower() for name in members}) == len(directory.members)
    if not are_unique or b"\0" in directory.raw_root or directory.raw_root + b"/data.pkl" not in members:
        raise NotUnderstoodError("an archive with names that are not unique")
    return members


def _has_known_version(source: Source, directory: torch_zip.Directory, members: dict[bytes, torch_zip.Member]) -> bool:
    """Return whether torch's reader would accept the archive's version (caffe2/serialize/versions.h)."""
    member = members.get(directory.raw_root + b"/version") or members.get(directory.raw_root + b"/.data/version")
    text = b"" if member is None else torch_zip.member_content(source, directory, member).strip()
    return text.isdigit() and len(text) < 3 and 1 <= int(text) <= _LATEST_VERSION


class _Records:
    """The storages of an archive.

    Attributes:
        storages: storages by key, in the order in which the pickle mentions them.
    """

    def __init__(
        self,
        source: Source,
        directory: torch_zip.Directory,
        members: dict[bytes, torch_zip.Member],
        file: str,
        *,
        folder: str = "data",
        is_remote: bool,
    ) -> None:
        self._source, self._directory, self._file = source, directory, file
        self._raw_folder = directory.raw_root + f"/{folder}/".encode("ascii")
        self._records = {name: member for name, member in members.items() if name.startswith(self._raw_folder)}
        self._ends = torch_zip.ends_of(directory)
        self.storages: dict[str, StorageEntry] = {}
        self._offsets = self._likely_offsets() if is_remote else torch_zip.payload_offsets(source, directory)
        self._inferred = dict(self._offsets) if is_remote else {}

    def storage(self, persistent_id: Any) -> StorageEntry:
        """Return the storage for a persistent id of the pickle."""
        if type(persistent_id) is not tuple or len(persistent_id) != 5:
            raise NotUnderstoodError("a persistent id of another kind")
        tag, kind, key, location, count = persistent_id
        if tag != "storage" or not (type(key) is type(location) is str and type(count) is int and count >= 0):
            raise NotUnderstoodError("a persistent id of another kind")
        if len(key) > _MAX_KEY_LENGTH or not _KEY.fullmatch(key):
            raise NotUnderstoodError("a storage with an unusual key")
        dtype = storage_type_of(kind)
        length = count * ITEM_BYTES[dtype]
        if (known := self.storages.get(key)) is not None:
            if known.length != length:  # torch would use the first mention, or any if the first is empty
                raise BrokenFileError(
                    f"damaged checkpoint (storage {key!r} should have {known.length} bytes, and {length})"
                )
            # torch.save gives all views of an empty storage one key, whatever their dtypes
            return known if length else replace(known, dtype=dtype)
        member = self._records.get(self._raw_folder + key.encode("ascii"))
        if member is None or member.size_bytes < length:
            has = "has none" if member is None else f"has {member.size_bytes}"
            raise BrokenFileError(f"damaged checkpoint (storage {key!r} should have {length} bytes, and {has})")
        if not member.is_stored:
            raise NotUnderstoodError("an archive with compressed tensors")
        entry = self.storages[key] = StorageEntry(key, self._file, self._offset(member), length, dtype, location)
        return entry

    def confirm(self, storage: StorageEntry) -> None:
        """Look up where a storage is, if that was inferred. See `FileIndex`."""
        member = self._records[self._raw_folder + storage.key.encode("ascii")]
        if (inferred := self._inferred.get(member.name)) is None:
            return
        if torch_zip.payload_offset(self._source, self._directory, member) != inferred:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} is not where its directory implies)")
        del self._inferred[member.name]

    def _offset(self, member: torch_zip.Member) -> int:
        offset = self._offsets.get(member.name)
        if offset is None:
            offset = torch_zip.payload_offset(self._source, self._directory, member)
        if offset + member.stored_bytes > self._ends[member.name]:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} overlaps what is next to it)")
        return offset

    def _likely_offsets(self) -> dict[str, int]:
        offsets = torch_zip.likely_offsets(self._directory)
        likely = [member for member in self._records.values() if member.name in offsets]
        for member in likely[:1] + likely[-1:]:
            if torch_zip.payload_offset(self._source, self._directory, member) != offsets[member.name]:
                return {}  # another writer than torch.save
        return offsets


def _byte_order(text: bytes) -> ByteOrder:
    if text not in (b"little", b"big"):
        raise BrokenFileError(f"damaged checkpoint (byte order {text[:20]!r})")
    return "little" if text == b"little" else "big"
