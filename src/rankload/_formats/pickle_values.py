"""Values read from an untrusted pickle: plain values, names, and notes of objects that were not built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rankload._formats.entry import StorageEntry
from rankload._text import cut, printable

#: Most values in a tuple that is a dict key, and longest string or bytes in such a key.
_MAX_KEY_LENGTH = 16
_MAX_PART_LENGTH = 64

#: Integers below this hash to themselves; larger ones repeat those hashes (sys.hash_info.modulus on 64-bit machines).
_MAX_KEY = (1 << 61) - 1

#: After so many keys a dict accepts only strings, whose hashes are unpredictable, and integers in a nearly gapless row,
#: such as the numbers of parameters.
_MAX_UNUSUAL_KEYS = 256
_MAX_GAP = 1024

SCALARS = (str, bytes, int, float, bool, type(None))


class NotUnderstoodError(ValueError):
    """The pickle is malformed, too long, or uses an operation that is not supported here. The file may be fine.

    The text is logged and shown, and may contain names from the file: unprintable characters are escaped.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(cut(text)))


class GlobalName(NamedTuple):
    """The name of a class or function that the pickle mentions; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Unbuilt:
    """A note of an object that was not built.

    Attributes:
        function: function that torch.load would call, usually a class; None if unknown.
        arguments: arguments of that call.
        state: state that torch.load would set after the call; None if there is none.
        items: items that torch.load would add after the call.
        cost: what it costs to copy it after the call, at most (see `pickle_stack`).
    """

    function: GlobalName | None
    arguments: tuple[Any, ...] = field(repr=False)
    state: Any = field(default=None, repr=False)
    items: list[Any] = field(default_factory=list, repr=False)
    cost: int = field(default=0, repr=False)


def display_name(value: Any) -> str:
    """Return a GlobalName as text, or the name of another value's type. The repr of nested tuples may be endless."""
    return str(value) if isinstance(value, GlobalName) else type(value).__name__


def holds_unbuilt(value: Any) -> bool:
    """Return whether nested content contains an `Unbuilt`, a bare GlobalName or a bare storage."""
    rest, seen = [value], set[int]()
    while rest:
        value = rest.pop()
        if isinstance(value, (Unbuilt, GlobalName, StorageEntry)):
            return True
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, Mapping) else value)
    return False


#: Make a value from the arguments of a call. The file chooses the arguments: a builder checks them, and raises
#: NotUnderstoodError or BrokenFileError.
Builder = Callable[[tuple[Any, ...]], Any]


def checked_key(key: Any, target: Mapping[Any, Any]) -> Any:
    """Return a new key for a dict, if the key is fast to hash, look up and show.

    Nested tuples may contain each item a million times. Numbers may be chosen such that all their hashes collide.

    Raises:
        NotUnderstoodError: the key may be slow.
    """
    if type(key) is str:  # as nearly all are
        return key
    if len(target) >= _MAX_UNUSUAL_KEYS and not _is_in_row(key, target):
        raise NotUnderstoodError("a pickle with many keys of an unusual kind")
    parts = key if type(key) is tuple else (key,)
    if (
        len(parts) > _MAX_KEY_LENGTH
        or not all(type(part) in SCALARS for part in parts)
        or any(type(part) is int and abs(part) >= _MAX_KEY for part in parts)
        or any(type(part) in (str, bytes) and len(part) > _MAX_PART_LENGTH for part in parts)
    ):
        raise NotUnderstoodError("a pickle with keys of an unusual kind")
    return key


def _is_in_row(key: Any, target: Mapping[Any, Any]) -> bool:
    first = next(iter(target))
    begin = first if type(first) is int else 0
    return type(key) is int and 0 <= key - begin <= len(target) + _MAX_GAP
