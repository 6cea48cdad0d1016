"""Read from an origin outside a transfer (an index, one tensor, a sidecar), with limits on time and size."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from rankload._fetch.origins.origin import Origin, Version
from rankload._fetch.transfer.retry import Retries, pause
from rankload._platform.daemon_threads import DeadlineThread
from rankload._settings import Settings
from rankload._types import Progress, Report
from rankload.errors import FetchError, FetchTimeoutError, TruncatedError

#: Bytes that must have come after `progress_seconds`, and in every further second (see `ReadDeadline`).
_SMALL_BYTES = 64 << 10
_MIN_BYTES_PER_SECOND = 4 << 10


@dataclass(frozen=True)
class Answer:
    """An origin's answer to one read.

    Attributes:
        content: bytes from the requested offset on, never more than were requested.
        version: version of the whole file.
        is_whole: whether the origin sends the whole file, even if a range was requested.
    """

    content: bytes
    version: Version
    is_whole: bool


def read_bounded(
    origin: Origin,
    begin: int,
    end: int | None,
    version: Version | None,
    *,
    most_bytes: int,
    settings: Settings,
    report: Report = lambda progress: None,
    unless: Version | None = None,
) -> Answer:
    """Read a range within the limits of `ReadDeadline`, and retry temporary failures.

    The request blocks a daemon thread, not the caller's thread: so signals and the failures of other ranks are noticed
    within 0.1 s. After an error, that thread may still wait for the origin: close the origin to end it.

    Args:
        origin: origin of the file. No other thread may use it meanwhile.
        begin, end: offsets in bytes, ``end`` exclusive; ``end=None`` requests the whole file.
        version: version that an earlier response described; only a range of that version is usable.
        most_bytes: number of body bytes after which to stop. At most one read from the socket more is received.
        settings: deadlines and retries.
        report: called repeatedly with the progress.
        unless: version that the caller already has.

    Raises:
        NotModified: the content is still of the version ``unless``.
        UnusableRange: the response is not the requested range.
        FetchTimeoutError: a deadline passed; this is not retried.
        FetchError: the origin does not serve the bytes.
        RankloadError: any error of ``report``.
    """
    deadline, retries, attempt = ReadDeadline(origin.display_name, settings.progress_seconds), Retries(settings), 0
    while True:
        attempt += 1
        pending_read = _PendingRead(origin, begin, end, version, unless, most_bytes)
        outcome = _await(pending_read, deadline, report, attempt)
        if isinstance(outcome, Answer):
            return outcome
        pause(retries.pause_after(outcome), report, attempt)


class ReadDeadline:
    """Deadlines of one read over all its attempts. Pauses between attempts do not count.

    Only bytes of a body are progress; status lines, headers and 1xx responses are not.

    - No progress: the read fails after ``progress_seconds`` without a byte.
    - Rate: after ``progress_seconds``, 64 KiB must have come, and 4 KiB more for every further second. Otherwise one
      byte every few seconds would hold the caller forever. So a response of up to 64 KiB takes at most
      ``progress_seconds``, but one of gigabytes may take days over a slow link.

    Args:
        display_name: the URL without secrets, for messages.
        progress_seconds: no-progress deadline in seconds, as above.
        clock: monotonic clock, in seconds.
    """

    def __init__(self, display_name: str, progress_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._display_name, self._limit_seconds, self._clock = display_name, progress_seconds, clock
        self._seconds = self._silent_seconds = 0.0
        self._bytes = self._bytes_of_try = 0
        self._checked_at = clock()

    def start_try(self) -> None:
        """Begin an attempt: count time again, and the attempt's bytes from 0."""
        self._checked_at, self._bytes_of_try = self._clock(), 0

    def check(self, received_bytes: int) -> None:
        """Raise FetchTimeoutError if a deadline has passed.

        Args:
            received_bytes: number of body bytes in this attempt so far.
        """
        now = self._clock()
        elapsed, self._checked_at = now - self._checked_at, now
        new_bytes, self._bytes_of_try = received_bytes - self._bytes_of_try, received_bytes
        self._bytes += new_bytes
        self._seconds += elapsed
        self._silent_seconds = 0.0 if new_bytes else self._silent_seconds + elapsed
        advice = "raise timeout= or RANKLOAD_PROGRESS_SECONDS, or pass a mirror"
        if self._silent_seconds > self._limit_seconds:
            text = f"not a byte came within the deadline of {self._limit_seconds:g} s; {advice}"
            raise FetchTimeoutError(f"{self._display_name}: {text}", url=self._display_name)
        seconds_over = self._seconds - self._limit_seconds
        if seconds_over > 0 and self._bytes < _SMALL_BYTES + seconds_over * _MIN_BYTES_PER_SECOND:
            text = f"only {self._bytes} bytes came in {self._seconds:.1f} s: too slow to wait for; {advice}"
            raise FetchTimeoutError(f"{self._display_name}: {text}", url=self._display_name, is_too_slow=True)


class _PendingRead:
    """One attempt, on a separate thread."""

    def __init__(
        self,
        origin: Origin,
        begin: int,
        end: int | None,
        version: Version | None,
        unless: Version | None,
        most_bytes: int,
    ) -> None:
        self._origin, self._begin, self._end = origin, begin, end
        self._version, self._unless, self._most_bytes = version, unless, most_bytes
        self.received_bytes = 0
        self.is_abandoned = False

    def run(self) -> Answer | FetchError:
        """Return the answer, or the origin's error. So an error that the wait raises is always the caller's."""
        try:
            return self._read()
        except FetchError as error:
            return error

    def _read(self) -> Answer:
        pieces: list[bytes] = []
        with self._origin.open(self._begin, self._end, self._version, unless=self._unless) as body:
            ends = [end for end in (self._end, body.version.size_bytes) if end is not None]
            promised = min(ends) - self._begin if body.version.size_bytes is not None else None
            wanted = self._most_bytes if promised is None else min(self._most_bytes, promised)
            while self.received_bytes < wanted and not self.is_abandoned and (piece := body.read()):
                pieces.append(piece)
                self.received_bytes += len(piece)
        if promised is not None and self.received_bytes < wanted:
            display_name, got = self._origin.display_name, self.received_bytes
            raise TruncatedError(
                f"{display_name}: {got} of {wanted} bytes came", url=display_name, expected=wanted, got=got
            )
        return Answer(b"".join(pieces)[:wanted], body.version, body.is_whole)


def _await(pending_read: _PendingRead, deadline: ReadDeadline, report: Report, attempt: int) -> Answer | FetchError:
    """Run an attempt to its end.

    Raises:
        FetchTimeoutError: a deadline passed.
        RankloadError: any error of ``report``.
    """

    def check_cancelled() -> None:
        report(Progress("connecting", pending_read.received_bytes, None, attempt))
        deadline.check(pending_read.received_bytes)

    report(Progress("connecting", 0, None, attempt))
    deadline.start_try()
    with closing(DeadlineThread("rankload-read")) as calls:
        try:
            outcome = calls.call(pending_read.run, on_wait=check_cancelled)
        finally:
            pending_read.is_abandoned = True
    if not isinstance(outcome, Answer):
        # the socket's own timeout may be as long as the deadline: then do not retry
        deadline.check(pending_read.received_bytes)
    return outcome
