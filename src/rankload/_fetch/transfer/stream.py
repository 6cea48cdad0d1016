"""One stream of a transfer: a thread that fetches range after range over one connection."""

from __future__ import annotations

import threading
import time

from rankload._fetch.origins.origin import Body, UnusableRange
from rankload._fetch.transfer.first_request import ByteRange
from rankload._fetch.transfer.state import TransferState
from rankload._fetch.transfer.target import Writer
from rankload.errors import FetchError, FetchTimeoutError, TruncatedError

#: Longest time between two notes of what was written. A killed process loses only the bytes since the last note.
_NOTE_SECONDS = 5.0


class Stream(threading.Thread):
    """A thread that fetches range after range over one connection.

    Attributes:
        is_waiting: whether the stream waits: because the origin asked for that, or before a retry.
    """

    def __init__(self, state: TransferState) -> None:
        super().__init__(name="rankload-stream", daemon=True)
        self.is_waiting = False
        self._state = state
        self._body: Body | None = None
        self._bytes_per_second = 0.0

    def run(self) -> None:
        """Fetch until no range is left, or the transfer ends."""
        try:
            writer = self._state.target.writer()
            try:
                while (span := self._state.take(self, self._bytes_per_second)) is not None:
                    self._fetch(span, writer)
            finally:
                writer.close()
        except Exception as error:
            self._state.fail(error)
        finally:
            self._state.leave(self)

    def break_off(self) -> None:
        """End a read that waits for its next byte at once."""
        if (body := self._body) is not None:
            body.break_off()

    def _fetch(self, span: ByteRange, writer: Writer) -> None:
        """Fetch a range, in several attempts if necessary."""
        while span.begin != span.end and not self._state.is_stopped:
            self._wait(self._state.hold_seconds())
            began_at, asked_at = span.begin, time.monotonic()
            try:
                self._try(span, writer)
                continue
            except UnusableRange as error:
                pause = self._state.pause_after_unusable_range(self, error)
            except FetchError as error:
                if self._state.is_stopped:
                    return
                pause = self._state.pause_after(self, error, asked_at=asked_at, has_moved=span.begin > began_at)
            if pause is None:
                self._state.give_back(span)
                return
            self._wait(pause)

    def _try(self, span: ByteRange, writer: Writer) -> None:
        """Send one request, and advance the span as far as the response goes.

        Raises:
            FetchError: the rest of the span has not come.
        """
        state = self._state
        started_at, first = time.monotonic(), span.begin
        with state.origin.open(span.begin, span.end, state.expected) as body:
            filled = state.admit(body, span)
            self._body = body
            try:
                self._receive(body, span, filled.end, writer)
            finally:
                self._body = None
        self._bytes_per_second = (span.begin - first) / max(time.monotonic() - started_at, 1e-6)
        if state.is_whole:
            state.ended()
            span.end = span.begin

    def _receive(self, body: Body, span: ByteRange, end: int | None, writer: Writer) -> None:
        state, display_name = self._state, self._state.origin.display_name
        first = noted = written = span.begin
        noted_at = time.monotonic()
        too_slow = _TooSlow(state.settings.minimum_bytes_per_second, state.settings.stall_seconds, display_name)
        try:
            # after the last byte, one more read finds the end of the body and frees the connection for another request
            while not (state.is_stopped or _is_cut(span, end)) and (piece := self._read(body, span, end)):
                offset, piece = state.claim(span, piece)
                writer.write(piece, offset)
                state.accept(offset, piece)
                written = span.begin
                if (now := time.monotonic()) - noted_at >= _NOTE_SECONDS or (
                    span.begin - noted >= state.settings.chunk_bytes
                ):
                    writer.finished(noted, span.begin)
                    noted, noted_at = span.begin, now
                too_slow.check(span.begin - first)
        finally:
            writer.finished(noted, written)
        if end is not None and span.begin < end and not (state.is_stopped or _is_cut(span, end)):
            raise TruncatedError(
                f"{display_name}: the body has {span.begin - body.begin} bytes, but {end - body.begin} were promised",
                url=display_name,
                expected=end - body.begin,
                got=span.begin - body.begin,
            )

    def _read(self, body: Body, span: ByteRange, end: int | None) -> bytes:
        """Return the next bytes of a body, perhaps beyond the span's end; an empty string at the end of the body.

        Args:
            body: body of the response.
            span: rest of the range. Another stream may have been given the end of it meanwhile.
            end: end of the range that the body fills; None if unknown until the body ends.

        Raises:
            FetchError: the connection broke, no byte came in time, or more bytes came than the origin promised or the
                caller allows.
        """
        display_name, piece = self._state.origin.display_name, body.read()
        if end is None:
            self._state.size_limit.check(display_name, span.begin + len(piece), is_announced=False)
            return piece
        if span.begin + len(piece) > end:
            raise TruncatedError(f"{display_name}: more bytes came than were promised", url=display_name, expected=end)
        return piece

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self.is_waiting = True
            self._state.wait(seconds)
            self.is_waiting = False


def _is_cut(span: ByteRange, end: int | None) -> bool:
    """Return whether a range is complete because other streams were given the rest of it meanwhile."""
    return end is not None and span.end is not None and span.begin >= span.end and span.end < end


class _TooSlow:
    """Checks a connection's rate over windows of ``window_seconds`` against a minimum; 0 accepts any rate."""

    def __init__(self, minimum: int, window_seconds: float, display_name: str) -> None:
        self._minimum, self._window_seconds, self._display_name = minimum, window_seconds, display_name
        self._began_at, self._bytes = time.monotonic(), 0

    def check(self, done_bytes: int) -> None:
        """Raise if the last window was too slow."""
        if not self._minimum or time.monotonic() - self._began_at < self._window_seconds:
            return
        rate = (done_bytes - self._bytes) / self._window_seconds
        if rate < self._minimum:
            raise FetchTimeoutError(
                f"{self._display_name}: {rate:.0f} bytes/s, less than minimum_bytes_per_second={self._minimum}",
                url=self._display_name,
                is_too_slow=True,
            )
        self._began_at, self._bytes = time.monotonic(), done_bytes
