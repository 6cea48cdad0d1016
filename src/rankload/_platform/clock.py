"""Measure the time during which this process was awake: a suspended process must not run into its deadlines.

A scheduler may suspend a job for an hour and then resume it. That hour counts towards no deadline.
"""

from __future__ import annotations

import time


class SuspendAwareTimer:
    """A stopwatch that pauses while the process is stopped. It starts when it is made.

    Args:
        longest_seconds: longest time between two counts while the process is awake; any excess is not counted.

    Attributes:
        seconds: time counted so far.
    """

    def __init__(self, longest_seconds: float) -> None:
        self._longest_seconds = longest_seconds
        self.restart()

    def restart(self) -> None:
        """Start again at 0."""
        self.seconds, self._counted_at = 0.0, time.monotonic()

    @property
    def uncounted_seconds(self) -> float:
        """Seconds since the last count, awake or not."""
        return time.monotonic() - self._counted_at

    def skip(self) -> None:
        """Ignore the time since the last count."""
        self._counted_at = time.monotonic()

    def count(self) -> float:
        """Count the time since the last count, and return the seconds that were added."""
        passed = min(self.uncounted_seconds, self._longest_seconds)
        self.seconds, self._counted_at = self.seconds + passed, time.monotonic()
        return passed


class NoProgressTimer:
    """Measures for how long a mark has stayed the same, in time for which this process was awake.

    Args:
        mark: what changes with every step forward, such as a number of bytes.
        longest_seconds: as for `SuspendAwareTimer`.
    """

    def __init__(self, mark: object, longest_seconds: float) -> None:
        self._mark, self._timer = mark, SuspendAwareTimer(longest_seconds)

    def restart(self) -> None:
        """Begin at 0 again: what has passed was a pause that counts for nothing."""
        self._timer.restart()

    def seconds_without_progress(self, mark: object) -> float:
        """Return for how long the mark has been what it is now."""
        self._timer.count()
        if mark != self._mark:
            self._mark = mark
            self._timer.restart()
        return self._timer.seconds
