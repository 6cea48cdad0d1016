"""Decide when a node fetches more than its part from the origin, because the ring is slower. Pure.

While all nodes fetch their parts at the same time, each sees the rate at which the origin would serve it if all nodes
fetched the whole file. So a node knows when it would have the whole file without the ring. It never wants to be later,
but waits for the ring as long as the origin can still bring the rest in time.
"""

from __future__ import annotations

from collections import deque

#: Shortest measurement of the ring's rate.
_WINDOW_SECONDS = 0.5

#: Shortest measurement of the origin's rate, unless more bytes than these have come: some origins let bursts through.
_BURST_SECONDS, _BURST_BYTES = 1.0, 4 << 20

#: Length of a measurement, in units that the origin sends in that time: the ring brings them as other nodes get them.
_WINDOW_UNITS = 2

#: Share of the time that the file would take without the ring, by which to have it: rates vary.
_AIM = 0.8

#: How much to fetch at once: what the origin sends in this time. Meanwhile the ring goes on.
_STEP_SECONDS = 0.5


class CatchUp:
    """Compares the ring with the origin.

    Args:
        now: time at which the exchange begins, of a monotonic clock, in seconds.
        missing_bytes: what the node does not have at that time.
        unit_bytes: size of a unit.
    """

    def __init__(self, now: float, missing_bytes: int, unit_bytes: int) -> None:
        self._began_at, self._missing_bytes, self._unit_bytes = now, missing_bytes, unit_bytes
        self._bytes_per_second: float | None = None  # of the origin
        self._samples = deque([(now, 0)])

    def bytes_to_fetch(self, now: float, *, origin_bytes: int, ring_bytes: int, left_bytes: int) -> int:
        """Return how many further bytes to fetch from the origin, 0 for none.

        Args:
            now: the time.
            origin_bytes: what has come from the origin.
            ring_bytes: what has come from the ring.
            left_bytes: what the node is to fetch, and has not come yet.
        """
        self._samples.append((now, ring_bytes))
        seconds = now - self._began_at
        shortest = _BURST_SECONDS if origin_bytes < _BURST_BYTES else 1e-3
        rate = self._bytes_per_second or origin_bytes / max(seconds, shortest)
        if not left_bytes:
            self._bytes_per_second = rate
        if not rate or seconds < shortest or left_bytes > rate * _STEP_SECONDS / 2:
            return 0
        window_seconds = max(_WINDOW_SECONDS, _WINDOW_UNITS * self._unit_bytes / rate)
        while now - self._samples[1][0] >= window_seconds:
            self._samples.popleft()
        then, ring_bytes_then = self._samples[0]
        if now - then < window_seconds:
            return 0
        self._bytes_per_second = rate  # later on, the origin sends at intervals
        seconds_left = max(0.0, _AIM * self._missing_bytes / rate - seconds)
        ring_rate = (ring_bytes - ring_bytes_then) / (now - then)
        missing_bytes = self._missing_bytes - origin_bytes - ring_bytes - left_bytes
        return 0 if max(rate, ring_rate) * seconds_left >= missing_bytes else round(rate * _STEP_SECONDS)
