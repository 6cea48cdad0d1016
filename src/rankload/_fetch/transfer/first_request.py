"""The first request of a transfer: it asks for all missing bytes, so that a URL that answers only once is enough.

Other streams share the rest after the origin has answered one of them. Until then, the first response is not cut short.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

#: Least number of chunks to share among several streams. Cutting the first response short loses the bytes in the
#: connection's buffers: up to a few MB.
_MIN_SHARED_CHUNKS = 4


@dataclass
class ByteRange:
    """A range that one stream fetches, in bytes. ``end`` is None if unknown until the body ends."""

    begin: int
    end: int | None


class FirstRequest:
    """The range of the first stream, and another stream's first request (the probe) for a part of that range.

    Args:
        stream: stream that sends the first request.
        span: all missing bytes, or the first gap of them.

    Attributes:
        span: range of the first stream, which moves the range's beginning.
        probe: part of ``span`` that another stream has requested, until the origin answers; None without a probe.
        may_probe: whether the origin has not permanently refused a probe.
    """

    def __init__(self, stream: object, span: ByteRange) -> None:
        self.span, self.may_probe = span, True
        self.probe: ByteRange | None = None
        self._stream = stream
        self._probing_stream: object | None = None
        self._began_at, self._first = time.monotonic(), span.begin

    def is_of(self, stream: object) -> bool:
        """Return whether a stream sends the first request."""
        return self._stream is stream

    def is_probed_by(self, stream: object) -> bool:
        """Return whether a stream has requested the probe."""
        return self._probing_stream is stream

    def next_probe(self, chunk_bytes: int, most_chunks: int, seconds: float) -> tuple[int, int] | None:
        """Return a range to probe: one that the first stream reaches in about ``seconds``. None if there is none.

        Args:
            chunk_bytes: length of the probe.
            most_chunks: largest distance from the first stream's position, in chunks.
            seconds: time until the first stream should reach the probe.
        """
        if self.span.end is None or self.probe is not None or not self.may_probe:
            return None
        done_bytes = self.span.begin - self._first
        rate = done_bytes / max(time.monotonic() - self._began_at, 1e-6)
        begin = self.span.begin + chunk_bytes * max(1, min(most_chunks, int(rate * seconds / chunk_bytes)))
        is_worthwhile = begin + _MIN_SHARED_CHUNKS * chunk_bytes <= self.span.end
        return (begin, begin + chunk_bytes) if is_worthwhile else None

    def send_probe(self, stream: object, begin: int, end: int) -> ByteRange:
        """Record that a stream requests a part of the range; return that part."""
        self._probing_stream, self.probe = stream, ByteRange(begin, end)
        return self.probe

    def withdraw_probe(self) -> None:
        """Forget the probe: the origin has not answered it, or it is not needed."""
        if self.probe is not None:
            self.probe.end = self.probe.begin
        self._probing_stream = self.probe = None

    def share(self, probe: ByteRange, chunk_bytes: int) -> tuple[int, int]:
        """Shorten the first range after the origin answered the probe; return the range that no stream fetches now."""
        assert self.span.end is not None and probe.end is not None
        end = self.span.end
        if self.span.begin < probe.begin:
            self.span.end = probe.begin
            return probe.end, end
        probe.end = probe.begin  # too late: the first stream is already past the probe
        self.span.end = min(self.span.begin + chunk_bytes, end)
        return self.span.end, end
