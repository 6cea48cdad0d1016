"""Choose the number of streams: as few as do nearly as well as more would. Pure."""

from __future__ import annotations

import math

#: The first stream runs alone for so long, unless it ends before: is one enough to fill the pipe?
_ALONE_SECONDS = 0.1

#: Then streams are tried in these steps.
_STEPS = (1, 4, 8, 16)

#: One measurement. Long enough for a few round trips to another continent.
_WINDOW_SECONDS = 0.4

#: More streams must gain so much to stay: each costs the origin a connection and this host a thread.
_GAIN = 1.15

#: A step up means twice the streams at least. Where bytes come at more than half of the hash's own speed, twice as many
#: could not be hashed: its core is the pipe that is full, and streams would only take it from it.
_MAX_HASH_LOAD = 0.5

#: How long a choice holds before it is put to the test again: networks change.
_HOLD_SECONDS = 20.0


class StreamScaler:
    """Climbs from one stream up while that helps, and comes down again when it does not.

    Args:
        limit: never more streams than that.

    Attributes:
        target: the number of streams there should be now.
    """

    def __init__(self, limit: int) -> None:
        self.target = 1
        self._steps = [step for step in _STEPS if step < limit] + [limit]
        self._rates: dict[int, float] = {}
        self._window: tuple[float, int] | None = None
        self._hold_until = 0.0

    def observe(self, now: float, done_bytes: int, active: int, hash_bytes_per_second: float = math.inf) -> None:
        """Take a look.

        Args:
            now: the clock, in seconds.
            done_bytes: received so far.
            active: number of streams that there are.
            hash_bytes_per_second: the speed of the hash while it is at work.
        """
        if self._window is None or active != self.target:  # streams come or go: nothing to measure
            self._window = (now, done_bytes) if done_bytes else None
            return
        began_at, bytes_then = self._window
        elapsed = now - began_at
        if elapsed < (_WINDOW_SECONDS if self._rates else _ALONE_SECONDS) or done_bytes == bytes_then:
            return
        rate = self._rates[self.target] = (done_bytes - bytes_then) / elapsed
        self._window = (now, done_bytes)
        self._choose(now, rate / hash_bytes_per_second)

    def back_off(self, now: float, active: int) -> None:
        """The origin has turned a stream away: use fewer for a while."""
        self.target = max(1, min(self.target, active) - 1)
        self._rates.clear()
        self._window = None
        self._hold_until = now + _HOLD_SECONDS

    def _choose(self, now: float, hash_load: float) -> None:
        if now < self._hold_until:
            return
        best = max(self._rates.values())
        enough = min(step for step, rate in self._rates.items() if rate * _GAIN >= best)
        may_climb = enough < self._steps[-1] and self._is_untried_above() and hash_load < _MAX_HASH_LOAD
        if enough == self.target and may_climb:
            self.target = next(step for step in self._steps if step > enough)
            self._rates.pop(self.target, None)
        elif enough == self.target:
            self._hold_until = now + _HOLD_SECONDS
            self._rates = {self.target: self._rates[self.target]}
        else:
            self.target = enough
            del self._rates[enough]  # measured before: once more, it may have been a burst

    def _is_untried_above(self) -> bool:
        """Return whether the next step up is still untried."""
        return not any(step > self.target for step in self._rates)
