"""torch's format before 1.6: five pickles one after the other, then the storages.

Magic number, protocol version, facts about the saving machine, the object, the storages' keys in file order;
then per storage its number of elements (8 bytes) and its bytes. Nothing in the file says how long it is, and
`torch.load` finds out late, so a truncated one is found here: by walking the pickles without building what
they describe.
"""

from __future__ import annotations

import mmap
from types import MappingProxyType
from typing import Any

from rankload._checkpoint.broken import BrokenFileError
from rankload._checkpoint.pickle_walk import GlobalName, NotUnderstoodError, PickleWalk

#: ``pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)``, the first bytes of nearly every file.
MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_MAGIC_AS_TEXT = b"L119547037146038801333356L\n."  # the same in pickle protocol 1
_PROTOCOL_VERSION = 1001
_COUNT_BYTES = 8

#: Bytes of one element, by the storage class's name.
_ELEMENT_BYTES = MappingProxyType(
    {
        **dict.fromkeys(("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage"), 1),
        **dict.fromkeys(("QUInt8Storage", "QInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
        **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
        **dict.fromkeys(("IntStorage", "FloatStorage", "QInt32Storage"), 4),
        **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
        "ComplexDoubleStorage": 16,
    }
)


def claims_to_be_legacy(head: bytes) -> bool:
    """Say whether a file that begins so was written in this format, with any pickle protocol."""
    if head.startswith(_MAGIC_AS_TEXT):
        return True
    return MAGIC.startswith(head[: len(MAGIC)]) or (head[:1] == b"\x80" and MAGIC[2:] in head[:32])


def check_length(descriptor: int, size_bytes: int) -> None:
    """Hold the file's size against what its pickles promise. A file that is not understood is left to torch.

    Bytes behind the end are allowed: torch.save can write several objects into one file, of which torch.load
    reads the first.

    Raises:
        BrokenFileError: the file is truncated.
    """
    with mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_READ) as content:
        try:
            expected = _expected_bytes(content)
        except NotUnderstoodError:
            return
    if expected > size_bytes:
        raise BrokenFileError(f"truncated checkpoint of torch's legacy format ({size_bytes} of {expected} bytes)")


def _expected_bytes(content: mmap.mmap) -> int:
    walk = PickleWalk(content)
    walk.next_pickle()  # the magic number
    if walk.next_pickle() != _PROTOCOL_VERSION:
        raise NotUnderstoodError("another protocol version")
    walk.next_pickle()  # the saving machine
    walk.next_pickle()  # the object
    sizes: dict[str, int] = {}
    for persistent_id in walk.persistent_ids:
        _add_storage(sizes, persistent_id)
    keys = walk.next_pickle()
    if type(keys) is not list or not all(type(key) is str and key in sizes for key in keys):
        raise NotUnderstoodError("storage keys of another kind")
    return walk.position + sum(_COUNT_BYTES + sizes[key] for key in keys)


def _add_storage(sizes: dict[str, int], persistent_id: Any) -> None:
    match persistent_id:
        case ("module", *_):
            return
        case ("storage", GlobalName() as storage_type, str(key), _, int(count), *_):
            element_bytes = _ELEMENT_BYTES.get(storage_type.name)
            if element_bytes is None or count < 0:
                raise NotUnderstoodError(f"storage {key!r} of {storage_type}")
            sizes.setdefault(key, count * element_bytes)  # as in torch, the first mention of a storage counts
        case _:
            raise NotUnderstoodError("a persistent id of another kind")
