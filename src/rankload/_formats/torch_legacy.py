"""torch's format before 1.6: five consecutive pickles, then the storages.

The pickles hold: the magic number, the protocol version, facts about the saving machine, the object, and the storages'
keys in file order. Each storage is its number of elements (8 bytes), then its bytes. The file does not store its own
length, and `torch.load` notices a truncation late. This module finds truncations early: it reads the pickles without
building their objects.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from rankload._formats.broken import BrokenFileError, CutOffError
from rankload._formats.entry import ITEM_BYTES, StorageEntry
from rankload._formats.index import FileIndex
from rankload._formats.pickle_values import GlobalName, NotUnderstoodError
from rankload._formats.pickle_vm import PickleMachine
from rankload._formats.source import LocalSource, Source, read_exactly
from rankload._formats.torch_objects import BUILDERS, storage_type_of

#: ``pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)``, the first bytes of nearly every file.
MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_MAGIC_AS_TEXT = b"L119547037146038801333356L\n."  # the magic number in pickle protocol 1
_PROTOCOL_VERSION = 1001
_COUNT_BYTES = 8

#: Size of the first read. Each further read is four times as long, until it contains all five pickles.
_FIRST_BYTES = 256 << 10

_MAX_BYTES = 256 << 20


def claims_to_be_legacy(head: bytes) -> bool:
    """Return whether a file's first bytes are of this format, with any pickle protocol."""
    if head.startswith(_MAGIC_AS_TEXT):
        return True
    return MAGIC.startswith(head[: len(MAGIC)]) or (head[:1] == b"\x80" and MAGIC[2:] in head[:32])


def check_length(source: Source) -> None:
    """Compare the file's size with the size that its pickles promise. A file that is not understood passes.

    Bytes after the end are allowed: torch.save can write several objects into one file, and torch.load reads the
    first.

    Raises:
        BrokenFileError: the file is truncated.
    """
    with suppress(NotUnderstoodError):
        read_legacy_index(source, "")


def read_legacy_index(source: Source, file: str) -> FileIndex:
    """Read the index of a legacy file.

    Args:
        source: the file.
        file: name of the file, for the entries.

    Raises:
        BrokenFileError: the file contradicts its format.
        NotUnderstoodError: only torch.load can read the file.
    """
    length = _FIRST_BYTES
    while True:
        length = min(length, source.size_bytes)
        try:
            head = read_exactly(source, length, 0)
            index = _Pickles(head, source.size_bytes, file).index()
            _check_counts(source, head, index.storages)
            return index
        except CutOffError:
            if length == source.size_bytes:
                raise
            if length >= _MAX_BYTES:  # the file may still be complete
                raise NotUnderstoodError("a legacy checkpoint with too many bytes besides its tensors") from None
        length *= 4


def _check_counts(source: Source, head: bytes, storages: tuple[StorageEntry, ...]) -> None:
    """Compare the number of elements that precedes each storage with the number in the pickle.

    torch.load refuses a file where they differ. Without this check, all later storages would be read from the wrong
    place. For a remote file only counts in the bytes read so far are checked: every other count would cost a request.
    """
    for storage in storages:
        begin = storage.offset - _COUNT_BYTES
        if storage.offset <= len(head):
            raw = head[begin : storage.offset]
        elif isinstance(source, LocalSource):
            raw = read_exactly(source, _COUNT_BYTES, begin)
        else:
            continue
        found, expected = int.from_bytes(raw, "little", signed=True), storage.length // ITEM_BYTES[storage.dtype]
        if found != expected:
            raise BrokenFileError(
                f"damaged checkpoint (storage {storage.key!r} should have {expected} elements, and has {found})"
            )


class _Pickles:
    """The pickles in the first bytes of a file. They are read twice: storage positions follow the tensors."""

    def __init__(self, head: bytes, size_bytes: int, file: str) -> None:
        self._head, self._size_bytes, self._file = head, size_bytes, file
        self._storages: dict[str, StorageEntry] = {}
        self._views: dict[str, tuple[str, int, int]] = {}

    def index(self) -> FileIndex:
        """Read the pickles, and return the index."""
        machine = PickleMachine(self._head, BUILDERS, self._first_mention)
        machine.next_pickle()  # the magic number
        if machine.next_pickle() != _PROTOCOL_VERSION:
            raise NotUnderstoodError("another protocol version")
        machine.next_pickle()  # the saving machine; elements are little-endian whatever its byte order
        begin = machine.position
        machine.next_pickle()
        keys = machine.next_pickle()
        self._place(keys, machine.position)
        again = PickleMachine(self._head, BUILDERS, self._placed)
        again.position = begin
        content = again.next_pickle()
        storages = tuple(storage for storage in self._storages.values() if storage.offset)
        return FileIndex(content, is_exact=again.is_exact, storages=storages)

    def _place(self, keys: Any, position: int) -> None:
        if type(keys) is not list or not all(type(key) is str and key in self._storages for key in keys):
            raise NotUnderstoodError("storage keys of another kind")
        for key in keys:
            position += _COUNT_BYTES
            storage = self._storages[key] = replace(self._storages[key], offset=position)
            position += storage.length
        if position > self._size_bytes:
            raise BrokenFileError(
                f"truncated checkpoint of torch's legacy format ({self._size_bytes} of {position} bytes)"
            )

    def _first_mention(self, persistent_id: Any) -> Any:
        match persistent_id:
            case ("module", GlobalName() as module, *_):
                return module
            # only ASCII: in another encoding, torch could see two keys where this reader sees one
            case ("storage", kind, str(key), str(location), int(count), view) if count >= 0 and key.isascii():
                dtype = storage_type_of(kind)
                length = count * ITEM_BYTES[dtype]
                # as in torch, the first mention of a storage counts
                storage = self._storages.setdefault(key, StorageEntry(key, self._file, 0, length, dtype, location))
                if not storage.length:  # torch.save gives all views of an empty storage one key, whatever their dtypes
                    storage = replace(storage, dtype=dtype)
                if view is None:
                    return storage
                if dtype != storage.dtype:
                    raise NotUnderstoodError("a view of a storage of another type")
                return self._view(storage, view)
            case _:
                raise NotUnderstoodError("a persistent id of another kind")

    def _placed(self, persistent_id: Any) -> Any:
        value = self._first_mention(persistent_id)
        if isinstance(value, StorageEntry) and not value.offset:
            raise BrokenFileError(f"damaged checkpoint (storage {value.key!r} is missing)")
        return value

    def _view(self, storage: StorageEntry, view: Any) -> StorageEntry:
        """Return the part of a storage that a view describes (torch 0.3 and before)."""
        match view:
            case (str(key), int(offset), int(count)) if offset >= 0 and count >= 0:
                place = (storage.key, offset, count)
                # torch knows storages and views by their keys alone
                if self._views.setdefault(key, place) != place or key in self._storages:
                    raise NotUnderstoodError("views of storages with the same key")
                item_bytes = ITEM_BYTES[storage.dtype]
                if (offset + count) * item_bytes > storage.length:
                    raise BrokenFileError(f"damaged checkpoint (a view reaches beyond storage {storage.key!r})")
                return replace(storage, offset=storage.offset + offset * item_bytes, length=count * item_bytes)
            case _:
                raise NotUnderstoodError("a view of a storage of another kind")
