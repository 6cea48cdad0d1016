"""The first request of a transfer asks for all that is missing, so that a URL may answer only once.

Other streams share the rest once the origin has answered one of them: until then nothing that is on its way is given
up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

#: What is left for several streams, at the least. It costs what the first answer has under way when it is cut short: up
#: to what the buffers of a connection hold, a few MB.
_MIN_SHARED_CHUNKS = 4


@dataclass
class ByteRange:
    """A range that one stream fetches; ``end`` is None where only the end of the body will tell."""

    begin: int
    end: int | None


class FirstRequest:
    """The range of the first stream, and the first request of another one for a part of it.

    Args:
        stream: the one that has sent the first request.
        span: all that is missing, or its first gap.

    Attributes:
        span: as it was given. Its stream moves its beginning.
        probe: a part of it that another stream has asked for; the origin has not answered yet.
        may_probe: the origin has not refused such a request for good.
    """

    def __init__(self, stream: object, span: ByteRange) -> None:
        self.span, self.may_probe = span, True
        self.probe: ByteRange | None = None
        self._stream = stream
        self._probing_stream: object | None = None
        self._began_at, self._first = time.monotonic(), span.begin

    def is_of(self, stream: object) -> bool:
        """Return whether a stream has sent the first request."""
        return self._stream is stream

    def is_probed_by(self, stream: object) -> bool:
        """Return whether a stream has asked for the probe."""
        return self._probing_stream is stream

    def next_probe(self, chunk_bytes: int, most_chunks: int, seconds: float) -> tuple[int, int] | None:
        """Return what another stream may ask for now: what the first one reaches in about so many seconds."""
        if self.span.end is None or self.probe is not None or not self.may_probe:
            return None
        done_bytes = self.span.begin - self._first
        rate = done_bytes / max(time.monotonic() - self._began_at, 1e-6)
        begin = self.span.begin + chunk_bytes * max(1, min(most_chunks, int(rate * seconds / chunk_bytes)))
        is_worthwhile = begin + _MIN_SHARED_CHUNKS * chunk_bytes <= self.span.end
        return (begin, begin + chunk_bytes) if is_worthwhile else None

    def send_probe(self, stream: object, begin: int, end: int) -> ByteRange:
        """Let a stream ask for a part."""
        self._probing_stream, self.probe = stream, ByteRange(begin, end)
        return self.probe

    def withdraw_probe(self) -> None:
        """Note that the origin has not answered it, or that nobody needs it."""
        if self.probe is not None:
            self.probe.end = self.probe.begin
        self._probing_stream = self.probe = None

    def share(self, probe: ByteRange, chunk_bytes: int) -> tuple[int, int]:
        """Shorten the first range, now that the origin has answered the probe; return what nobody fetches any more."""
        assert self.span.end is not None and probe.end is not None
        end = self.span.end
        if self.span.begin < probe.begin:
            self.span.end = probe.begin
            return probe.end, end
        probe.end = probe.begin  # too late: the first stream is past it
        self.span.end = min(self.span.begin + chunk_bytes, end)
        return self.span.end, end
