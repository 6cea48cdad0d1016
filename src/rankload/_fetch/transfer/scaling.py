"""Choose the number of streams: the fewest that are nearly as fast as more. Pure."""

from __future__ import annotations

import math

#: How long the first stream runs alone. One stream may be enough to use the whole bandwidth.
_ALONE_SECONDS = 0.1

#: Numbers of streams to try after that.
_STEPS = (1, 4, 8, 16)

#: Length of one measurement: a few round trips to another continent.
_WINDOW_SECONDS = 0.4

#: Least gain of more streams, as a factor. Each stream costs the origin a connection and this host a thread.
_GAIN = 1.15

#: Largest load of the hash, as a share of its own speed, at which more streams are tried. A step up at least doubles
#: the streams. At more than half of the hash's speed, twice as many bytes could not be hashed: the hash's core is the
#: bottleneck, and more streams would take CPU time from it.
_MAX_HASH_LOAD = 0.5

#: How long a choice holds before it is tested again: networks change.
_HOLD_SECONDS = 20.0


class StreamScaler:
    """Increases the number of streams from one while that helps, and decreases it when it does not.

    Args:
        limit: largest number of streams.

    Attributes:
        target: the number of streams to use now.
    """

    def __init__(self, limit: int) -> None:
        self.target = 1
        self._steps = [step for step in _STEPS if step < limit] + [limit]
        self._rates: dict[int, float] = {}
        self._window: tuple[float, int] | None = None
        self._hold_until = 0.0

    def observe(self, now: float, done_bytes: int, active: int, hash_bytes_per_second: float = math.inf) -> None:
        """Measure the rate, and choose a new target after each measurement.

        Args:
            now: time of a monotonic clock, in seconds.
            done_bytes: bytes received so far.
            active: number of streams that run now.
            hash_bytes_per_second: speed of the hash while it works.
        """
        if self._window is None or active != self.target:  # streams start or end: the rate says nothing
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
        """Use fewer streams for a while, because the origin refused one."""
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
            del self._rates[enough]  # measure again: the earlier rate may have been a burst

    def _is_untried_above(self) -> bool:
        """Return whether the next step up is still untried."""
        return not any(step > self.target for step in self._rates)
