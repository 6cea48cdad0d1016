"""torch's format before 1.6: five pickles one after the other, then the storages.

Magic number, protocol version, facts about the saving machine, the object, the storages' keys in file order; then per
storage its number of elements (8 bytes) and its bytes. Nothing in the file says how long it is, and `torch.load` finds
out late, so a truncated one is found here: by reading the pickles without building what they describe.
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
_MAGIC_AS_TEXT = b"L119547037146038801333356L\n."  # the same in pickle protocol 1
_PROTOCOL_VERSION = 1001
_COUNT_BYTES = 8

#: How much is read at first; then four times as much, until all five pickles are in it.
_FIRST_BYTES = 256 << 10

_MAX_BYTES = 256 << 20


def claims_to_be_legacy(head: bytes) -> bool:
    """Say whether a file that begins so was written in this format, with any pickle protocol."""
    if head.startswith(_MAGIC_AS_TEXT):
        return True
    return MAGIC.startswith(head[: len(MAGIC)]) or (head[:1] == b"\x80" and MAGIC[2:] in head[:32])


def check_length(source: Source) -> None:
    """Hold the file's size against what its pickles promise. A file that is not understood is left to torch.

    Bytes after the end are allowed: torch.save can write several objects into one file, of which torch.load
    reads the first.

    Raises:
        BrokenFileError: the file is truncated.
    """
    with suppress(NotUnderstoodError):
        read_legacy_index(source, "")


def read_legacy_index(source: Source, file: str) -> FileIndex:
    """Read the index.

    Raises:
        BrokenFileError: the file contradicts its format.
        NotUnderstoodError: only torch.load can read it.
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
            if length >= _MAX_BYTES:  # whole it may be, all the same
                raise NotUnderstoodError("a legacy checkpoint with so much in it besides its tensors") from None
        length *= 4


def _check_counts(source: Source, head: bytes, storages: tuple[StorageEntry, ...]) -> None:
    """Compare the number of elements before each storage with the pickle's.

    torch.load refuses a file where they differ; here, all later storages would be read from the wrong place. Of a
    remote file only what has been read is checked: every other count would cost a request.
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
    """The pickles in the first bytes of a file. They are read twice: where storages lie comes after the tensors."""

    def __init__(self, head: bytes, size_bytes: int, file: str) -> None:
        self._head, self._size_bytes, self._file = head, size_bytes, file
        self._storages: dict[str, StorageEntry] = {}

    def index(self) -> FileIndex:
        """Put together what they say."""
        machine = PickleMachine(self._head, BUILDERS, self._first_mention)
        machine.next_pickle()  # the magic number
        if machine.next_pickle() != _PROTOCOL_VERSION:
            raise NotUnderstoodError("another protocol version")
        machine.next_pickle()  # the saving machine; whatever its byte order, elements are written the lowest byte first
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
            # in another encoding, torch could see two keys where we see one
            case ("storage", kind, str(key), str(location), int(count), view) if count >= 0 and key.isascii():
                dtype = storage_type_of(kind)
                length = count * ITEM_BYTES[dtype]
                # as in torch, the first mention of a storage counts
                storage = self._storages.setdefault(key, StorageEntry(key, self._file, 0, length, dtype, location))
                return self._view(storage, view)
            case _:
                raise NotUnderstoodError("a persistent id of another kind")

    def _placed(self, persistent_id: Any) -> Any:
        value = self._first_mention(persistent_id)
        if isinstance(value, StorageEntry) and not value.offset:
            raise BrokenFileError(f"damaged checkpoint (storage {value.key!r} is nowhere in it)")
        return value

    def _view(self, storage: StorageEntry, view: Any) -> StorageEntry:
        """Return the part of a storage that is one of its own (torch 0.3 and before)."""
        match view:
            case None:
                return storage
            case (_, int(offset), int(count)) if offset >= 0 and count >= 0:
                item_bytes = ITEM_BYTES[storage.dtype]
                if (offset + count) * item_bytes > storage.length:
                    raise BrokenFileError(f"damaged checkpoint (a view reaches beyond storage {storage.key!r})")
                return replace(storage, offset=storage.offset + offset * item_bytes, length=count * item_bytes)
            case _:
                raise NotUnderstoodError("a view of a storage of another kind")
