"""The memo of a pickle: values that it mentions again, by numbers."""

from __future__ import annotations

from typing import Any

from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_values import NotUnderstoodError

#: Stands where nothing has been put, between two numbers.
_NOT_KEPT = object()

#: Python 2 began at 1. A few bytes could leave gigabytes out.
_MAX_GAPS = 1024


class PickleMemo:
    """A list: of a dict, the file could choose numbers that take it long to find."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._gaps_left = _MAX_GAPS

    def get(self, number: int) -> Any:
        """Return what was put there.

        Raises:
            IndexError, NotUnderstoodError: nothing was.
        """
        value = self._values[number]
        if value is _NOT_KEPT:
            raise NotUnderstoodError("a malformed pickle")
        return value

    def put(self, number: int, value: Any) -> None:
        """Keep a value.

        Raises:
            BrokenFileError: too many numbers would be left out.
        """
        values = self._values
        if number > len(values):
            self._gaps_left -= number - len(values)
            if self._gaps_left < 0:
                raise BrokenFileError("damaged checkpoint (its pickle has a memo of unusual numbers)")
            values.extend([_NOT_KEPT] * (number - len(values)))
        values[number : number + 1] = [value]

    def append(self, value: Any) -> None:
        """Keep a value under the next number.

        Raises:
            NotUnderstoodError: unpicklers disagree which that is, since others were left out.
        """
        if self._gaps_left < _MAX_GAPS:
            raise NotUnderstoodError("a malformed pickle")
        self._values.append(value)
