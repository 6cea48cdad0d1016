"""In which order ways are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Way = TypeVar("Way")


def interleaved(ways: Sequence[Way], rounds: int) -> Iterator[Way]:
    """Yield each way once a round, in every second round in reverse.

    What one leaves behind for a while (gigabytes that the system takes back, a core that has clocked down) is not
    always met by the same one.
    """
    for number in range(rounds):
        yield from ways if number % 2 == 0 else reversed(ways)
