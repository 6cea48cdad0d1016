"""What comes out of a pickle that is read without trust: plain values, names, and notes of what was not built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rankload._checkpoint.entry import StorageEntry

_LONGEST_KEY = 16

#: Integers hash to themselves up to there (sys.hash_info.modulus on 64-bit machines), and begin again behind it.
_LARGEST_KEY = (1 << 61) - 1

_SCALARS = (str, bytes, int, float, bool, type(None))


class NotUnderstoodError(ValueError):
    """The pickle is malformed, too long, or uses what this machine does not know. Not a verdict on the file."""


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
    """

    function: GlobalName | None
    arguments: tuple[Any, ...] = field(repr=False)
    state: Any = field(default=None, repr=False)


def shown(value: Any) -> str:
    """Return a name as text, and of anything else its type: tuples of tuples may hold each of their items for ever."""
    return str(value) if isinstance(value, GlobalName) else type(value).__name__


def holds_unbuilt(value: Any) -> bool:
    """Tell whether there is such an object, the bare name of one, or a bare storage, anywhere in nested content."""
    if isinstance(value, (Unbuilt, GlobalName, StorageEntry)):
        return True
    if isinstance(value, Mapping):
        return any(map(holds_unbuilt, value.values()))
    return isinstance(value, (list, tuple)) and any(map(holds_unbuilt, value))


#: Makes a value of a call's arguments. It gets whatever the file says: it checks, and raises NotUnderstoodError.
Builder = Callable[[tuple[Any, ...]], Any]


def checked_key(key: Any) -> Any:
    """Return a dict's key, if hashing it is quick: tuples of tuples may hold each of their items a million times."""
    if type(key) is str:  # as nearly all are
        return key
    parts = key if type(key) is tuple else (key,)
    if (
        len(parts) > _LONGEST_KEY
        or not all(type(part) in _SCALARS for part in parts)
        or any(type(part) is int and abs(part) >= _LARGEST_KEY for part in parts)
    ):
        raise NotUnderstoodError("a pickle with keys of an unusual kind")
    return key
