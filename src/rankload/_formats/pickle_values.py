"""What comes out of a pickle that is read without trust: plain values, names, and notes of what was not built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rankload._formats.entry import StorageEntry
from rankload._text import cut, printable

#: How many values a tuple that is a key has, and how long a text is in it, or bytes.
_MAX_KEY_LENGTH = 16
_MAX_PART_LENGTH = 64

#: Integers hash to themselves up to there (sys.hash_info.modulus on 64-bit machines), and begin again after it.
_MAX_KEY = (1 << 61) - 1

#: Behind so many keys only texts, whose hashes nobody foresees, and numbers that leave few out, as of parameters.
_MAX_UNUSUAL_KEYS = 256
_MAX_GAP = 1024

SCALARS = (str, bytes, int, float, bool, type(None))


class NotUnderstoodError(ValueError):
    """The pickle is malformed, too long, or uses what this machine does not know. Not a verdict on the file.

    Its text is logged and shown, and may hold names from the file: unprintable characters are escaped.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(cut(text)))


class GlobalName(NamedTuple):
    """A class or function that the pickle mentions; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Unbuilt:
    """An object that was not built.

    Attributes:
        function: what would have been called: usually a class.
        arguments: with what.
        state: what it would have been given then; None where there is none.
        items: what would have been put into it then.
    """

    function: GlobalName | None
    arguments: tuple[Any, ...] = field(repr=False)
    state: Any = field(default=None, repr=False)
    items: list[Any] = field(default_factory=list, repr=False)


def display_name(value: Any) -> str:
    """Return a name as text, and of anything else its type: tuples of tuples may hold each of their items forever."""
    return str(value) if isinstance(value, GlobalName) else type(value).__name__


def holds_unbuilt(value: Any) -> bool:
    """Return whether there is such an object, the bare name of one, or a bare storage, anywhere in nested content."""
    rest, seen = [value], set[int]()
    while rest:
        value = rest.pop()
        if isinstance(value, (Unbuilt, GlobalName, StorageEntry)):
            return True
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, Mapping) else value)
    return False


#: Makes a value of a call's arguments. It gets whatever the file says: it checks, and raises NotUnderstoodError.
Builder = Callable[[tuple[Any, ...]], Any]


def checked_key(key: Any, target: Mapping[Any, Any]) -> Any:
    """Return another key for a dict, if it is quick to hash, to find and to show.

    Tuples of tuples may hold each of their items a million times, and numbers may be such that a dict has to look at
    all of them for each.
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
