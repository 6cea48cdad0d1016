"""One stream of a transfer: a thread that fetches range after range over a connection of its own."""

from __future__ import annotations

import threading
import time

from rankload._fetch.origins.base import Body, UnusableRange
from rankload._fetch.transfer.first_request import Span
from rankload._fetch.transfer.state import Work
from rankload._fetch.transfer.target import Writer
from rankload.errors import FetchError, FetchTimeoutError, TruncatedError

#: A killed process loses no more of a slow download than what has come in so long.
_NOTE_SECONDS = 5.0


class Stream(threading.Thread):
    """See the module.

    Attributes:
        is_waiting: it has been asked to wait, or waits before it tries again.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(name="rankload-stream", daemon=True)
        self.is_waiting = False
        self._work = work
        self._body: Body | None = None
        self._bytes_per_second = 0.0

    def run(self) -> None:
        """Fetch until nothing is left, or the transfer ends."""
        try:
            writer = self._work.target.writer()
            try:
                while (span := self._work.take(self, self._bytes_per_second)) is not None:
                    self._fetch(span, writer)
            finally:
                writer.close()
        except Exception as error:
            self._work.fail(error)
        finally:
            self._work.leave(self)

    def break_off(self) -> None:
        """Let a read that waits for its next byte end at once."""
        if (body := self._body) is not None:
            body.break_off()

    def _fetch(self, span: Span, writer: Writer) -> None:
        """Fetch a range, in several tries perhaps."""
        while span.begin != span.end and not self._work.is_stopped:
            self._wait(self._work.hold_seconds())
            began_at, asked_at = span.begin, time.monotonic()
            try:
                self._try(span, writer)
                continue
            except UnusableRange as error:
                pause = self._work.pause_after_unusable_range(self, error)
            except FetchError as error:
                if self._work.is_stopped:
                    return
                pause = self._work.pause_after(self, error, asked_at=asked_at, has_moved=span.begin > began_at)
            if pause is None:
                self._work.give_back(span)
                return
            self._wait(pause)

    def _try(self, span: Span, writer: Writer) -> None:
        """Ask once, and advance the span as far as the answer goes.

        Raises:
            FetchError: the rest of the span has not come.
        """
        work = self._work
        started_at, first = time.monotonic(), span.begin
        with work.origin.open(span.begin, span.end, work.expected) as body:
            filled = work.admit(body, span)
            self._body = body
            try:
                self._receive(body, span, filled.end, writer)
            finally:
                self._body = None
        self._bytes_per_second = (span.begin - first) / max(time.monotonic() - started_at, 1e-6)
        if work.is_whole:
            work.ended()
            span.end = span.begin

    def _receive(self, body: Body, span: Span, end: int | None, writer: Writer) -> None:
        work, shown = self._work, self._work.origin.shown
        first = noted = span.begin
        noted_at = time.monotonic()
        too_slow = _TooSlow(work.settings.minimum_bytes_per_second, work.settings.stall_seconds, shown)
        try:
            # where it is all there, the last read finds the end: the connection is free for another request
            while not (work.is_stopped or _is_cut(span, end)) and (piece := self._read(body, span, end)):
                writer.write(piece, span.begin)
                work.accept(span.begin, piece)
                span.begin += len(piece)
                if (now := time.monotonic()) - noted_at >= _NOTE_SECONDS or (
                    span.begin - noted >= work.settings.chunk_bytes
                ):
                    writer.finished(noted, span.begin)
                    noted, noted_at = span.begin, now
                too_slow.check(span.begin - first)
        finally:
            writer.finished(noted, span.begin)
        if end is not None and span.begin < end and not (work.is_stopped or _is_cut(span, end)):
            raise TruncatedError(
                f"{shown}: the body has {span.begin - body.begin} bytes, but {end - body.begin} were promised",
                url=shown,
                expected=end - body.begin,
                got=span.begin - body.begin,
            )

    def _read(self, body: Body, span: Span, end: int | None) -> bytes:
        """Return the next bytes for where a range begins, as far as it goes; nothing at the end of the body.

        Args:
            body: the answer.
            span: what is left of the range. Another stream may have been given its end meanwhile.
            end: of what the body is to fill; None where only the end of the body will tell.

        Raises:
            FetchError: the body broke, no byte came in time, or more came than were promised or the caller allows.
        """
        shown, piece = self._work.origin.shown, body.read()
        if end is None:
            self._work.size_limit.check(shown, span.begin + len(piece), is_announced=False)
            return piece
        if span.begin + len(piece) > end:
            raise TruncatedError(f"{shown}: more bytes came than were promised", url=shown, expected=end)
        return piece if span.end is None else piece[: span.end - span.begin]

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self.is_waiting = True
            self._work.wait(seconds)
            self.is_waiting = False


def _is_cut(span: Span, end: int | None) -> bool:
    """Return whether a range has been fetched whose rest was given to other streams while it was on its way."""
    return end is not None and span.end is not None and span.begin >= span.end and span.end < end


class _TooSlow:
    """Holds a connection to a minimum rate, if there is one, over windows of ``window_seconds``."""

    def __init__(self, minimum: int, window_seconds: float, shown: str) -> None:
        self._minimum, self._window_seconds, self._shown = minimum, window_seconds, shown
        self._began_at, self._bytes = time.monotonic(), 0

    def check(self, done_bytes: int) -> None:
        """Raise if the last window was too slow."""
        if not self._minimum or time.monotonic() - self._began_at < self._window_seconds:
            return
        rate = (done_bytes - self._bytes) / self._window_seconds
        if rate < self._minimum:
            raise FetchTimeoutError(
                f"{self._shown}: {rate:.0f} bytes/s, less than minimum_bytes_per_second={self._minimum}",
                url=self._shown,
                is_too_slow=True,
            )
        self._began_at, self._bytes = time.monotonic(), done_bytes
