"""The index of a checkpoint of torch's zip format: its pickle, and where each storage's record lies."""

from __future__ import annotations

from typing import Any

from rankload._checkpoint import torch_zip
from rankload._checkpoint.broken import BrokenFileError
from rankload._checkpoint.entry import ITEM_BYTES, StorageEntry
from rankload._checkpoint.index import ByteOrder, FileIndex
from rankload._checkpoint.pickle_machine import PickleMachine
from rankload._checkpoint.pickle_values import NotUnderstoodError
from rankload._checkpoint.source import Source
from rankload._checkpoint.state_dict_pickle import read_state_dict
from rankload._checkpoint.torch_objects import BUILDERS, EXACT_BUILDERS, storage_type_of

#: torch.save writes 3; later ones, up to this, are TorchScript's.
_LATEST_VERSION = 10


def read_zip_index(source: Source, file: str, *, is_remote: bool, exactly: bool = False) -> FileIndex:
    """Read the index.

    Args:
        source: the file.
        file: its name, for the entries.
        is_remote: a read costs a round trip: where payloads begin is inferred from the directory, and only the first
            and the last are looked up.
        exactly: what would only be made in a simpler way than torch.load does stays `Unbuilt`.

    Raises:
        BrokenFileError, NotUnderstoodError: see there.
    """
    directory = torch_zip.read_directory(source)
    if directory.kind != "torch_zip":
        raise NotUnderstoodError(f"a zip archive of the kind {directory.kind}")
    members = {member.name: member for member in directory.members}
    records = _Records(source, directory, members, file, is_remote=is_remote)
    pickled = torch_zip.member_content(source, directory, members[f"{directory.root}/data.pkl"])
    builders, is_exact = EXACT_BUILDERS if exactly else BUILDERS, exactly
    content: Any = read_state_dict(pickled, builders, records.storage)
    if content is None:
        machine = PickleMachine(pickled, builders, records.storage)
        content = machine.next_pickle()
        is_exact = exactly and machine.is_exact
    member = members.get(f"{directory.root}/byteorder")  # since torch 2.1
    order = None if member is None else _byte_order(torch_zip.member_content(source, directory, member))
    is_exact = is_exact and _has_known_version(source, directory, members)
    return FileIndex(content, order, is_exact, tuple(records.storages.values()))


def _has_known_version(source: Source, directory: torch_zip.Directory, members: dict[str, torch_zip.Member]) -> bool:
    """Tell whether torch's reader would take the archive (caffe2/serialize/versions.h)."""
    member = members.get(f"{directory.root}/version") or members.get(f"{directory.root}/.data/version")
    text = b"" if member is None else torch_zip.member_content(source, directory, member).strip()
    return text.isdigit() and len(text) < 3 and 1 <= int(text) <= _LATEST_VERSION


class _Records:
    """The storages of an archive.

    Attributes:
        storages: by their keys, in the order in which the pickle mentions them.
    """

    def __init__(
        self,
        source: Source,
        directory: torch_zip.Directory,
        members: dict[str, torch_zip.Member],
        file: str,
        *,
        is_remote: bool,
    ) -> None:
        self._source, self._directory, self._members, self._file = source, directory, members, file
        self._folder = f"{directory.root}/data/"
        self.storages: dict[str, StorageEntry] = {}
        self._offsets = self._likely_offsets() if is_remote else torch_zip.payload_offsets(source, directory)

    def storage(self, persistent_id: Any) -> StorageEntry:
        """Return the storage that a pickle names."""
        if type(persistent_id) is not tuple or len(persistent_id) != 5:
            raise NotUnderstoodError("a persistent id of another kind")
        tag, kind, key, location, count = persistent_id
        if tag != "storage" or not (type(key) is type(location) is str and type(count) is int and count >= 0):
            raise NotUnderstoodError("a persistent id of another kind")
        dtype = storage_type_of(kind)
        if (known := self.storages.get(key)) is not None:
            return known
        member = self._members.get(self._folder + key)
        length = count * ITEM_BYTES[dtype]
        if member is None or member.size_bytes < length:
            has = "has none" if member is None else f"has {member.size_bytes}"
            raise BrokenFileError(f"damaged checkpoint (storage {key!r} should have {length} bytes, and {has})")
        if not member.is_stored:
            raise NotUnderstoodError("an archive with compressed tensors")
        entry = self.storages[key] = StorageEntry(key, self._file, self._offset(member), length, dtype, location)
        return entry

    def _offset(self, member: torch_zip.Member) -> int:
        offset = self._offsets.get(member.name)
        return torch_zip.payload_offset(self._source, self._directory, member) if offset is None else offset

    def _likely_offsets(self) -> dict[str, int]:
        offsets = torch_zip.likely_offsets(self._directory)
        likely = [name for name in offsets if name.startswith(self._folder)]
        for name in likely[:1] + likely[-1:]:
            if torch_zip.payload_offset(self._source, self._directory, self._members[name]) != offsets[name]:
                return {}  # a writer with habits of its own
        return offsets


def _byte_order(text: bytes) -> ByteOrder:
    if text not in (b"little", b"big"):
        raise BrokenFileError(f"damaged checkpoint (byte order {text[:20]!r})")
    return "little" if text == b"little" else "big"
