"""Time during which this process was awake: a suspended process must not run into its deadlines.

A job that a scheduler suspends for an hour, and then lets go on, has not waited for an hour.
"""

from __future__ import annotations

import time


class SuspendAwareTimer:
    """A stopwatch that stands still while the process is stopped. It runs from the start.

    Args:
        longest_seconds: the most that passes between two counts while the process is awake; more is not counted.

    Attributes:
        seconds: counted so far.
    """

    def __init__(self, longest_seconds: float) -> None:
        self._longest_seconds = longest_seconds
        self.restart()

    def restart(self) -> None:
        """Begin at 0 again."""
        self.seconds, self._counted_at = 0.0, time.monotonic()

    @property
    def uncounted_seconds(self) -> float:
        """Return what has passed since the last count, awake or not."""
        return time.monotonic() - self._counted_at

    def skip(self) -> None:
        """Leave out what has passed since the last count."""
        self._counted_at = time.monotonic()

    def count(self) -> float:
        """Count what has passed since the last time; return that."""
        passed = min(self.uncounted_seconds, self._longest_seconds)
        self.seconds, self._counted_at = self.seconds + passed, time.monotonic()
        return passed
