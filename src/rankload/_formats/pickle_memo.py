"""The memo of a pickle: numbered values that the pickle refers to again."""

from __future__ import annotations

from typing import Any

from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_values import NotUnderstoodError

#: Placeholder for numbers without a value.
_NOT_KEPT = object()

#: Most numbers without a value. Python 2 began at 1. Without a limit, a few bytes could make the list gigabytes long.
_MAX_GAPS = 1024


class PickleMemo:
    """A memo, kept in a list: for a dict, a crafted file could choose numbers whose hashes collide."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._gaps_left = _MAX_GAPS

    def get(self, number: int) -> Any:
        """Return the value with a number.

        Raises:
            IndexError, NotUnderstoodError: no value has the number.
        """
        value = self._values[number]
        if value is _NOT_KEPT:
            raise NotUnderstoodError("a malformed pickle")
        return value

    def put(self, number: int, value: Any) -> None:
        """Store a value under a number.

        Raises:
            BrokenFileError: too many numbers would have no value.
        """
        values = self._values
        if number > len(values):
            self._gaps_left -= number - len(values)
            if self._gaps_left < 0:
                raise BrokenFileError("damaged checkpoint (its pickle has a memo of unusual numbers)")
            values.extend([_NOT_KEPT] * (number - len(values)))
        values[number : number + 1] = [value]

    def append(self, value: Any) -> None:
        """Store a value under the next number.

        Raises:
            NotUnderstoodError: numbers were skipped before, and unpicklers disagree about the next number then.
        """
        if self._gaps_left < _MAX_GAPS:
            raise NotUnderstoodError("a malformed pickle")
        self._values.append(value)
