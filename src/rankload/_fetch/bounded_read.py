"""Reads from an origin outside a transfer (an index, one tensor, a sidecar), bounded in time and in size."""

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

#: What must have come once `progress_seconds` have passed, and in every second after that: see `ReadDeadline`.
_SMALL_BYTES = 64 << 10
_MIN_BYTES_PER_SECOND = 4 << 10


@dataclass(frozen=True)
class Answer:
    """What an origin has sent.

    Attributes:
        content: the bytes from the requested offset on, never more than were asked for.
        version: what the origin says of the whole file.
        is_whole: it sends the whole file, whatever is asked for.
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
    """Read a range, retrying failures that may pass, within the limits of `ReadDeadline`.

    The request blocks a daemon thread, not the caller's: signals and the failures of other ranks are noticed within
    0.1 s. Where this raises, that thread may still wait for the origin: close the origin to end it.

    Args:
        origin: serves the file. Not shared with other threads meanwhile.
        begin, end: offsets in bytes; ``end`` None asks for the whole file.
        version: what an earlier answer said; the range is wanted of that version alone.
        most_bytes: stop reading the body here, however long it is. At most one read from the socket more is received.
        settings: deadlines, retries.
        report: gets the progress, again and again.
        unless: nothing is wanted if the content is still of this version.

    Raises:
        NotModified: it is.
        UnusableRange: the answer is not the range that was asked for.
        FetchTimeoutError: a deadline passed; this is not retried.
        FetchError: the origin does not give the bytes.
        RankloadError: whatever ``report`` raises.
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
    """Deadlines of one read over all of its tries. Pauses between tries do not count.

    Only bytes of a body are progress; status lines, headers and 1xx answers are not.

    - No progress: the read fails after ``progress_seconds`` without a byte.
    - Pace: after ``progress_seconds``, 64 KiB must have come, and 4 KiB more for every second since. Otherwise one byte
      every few seconds would hold the caller forever. So an answer of up to 64 KiB takes ``progress_seconds`` at most,
      and one of gigabytes may take days over a slow link.

    Args:
        display_name: the URL for messages.
        progress_seconds: see above.
        clock: monotonic, in seconds.
    """

    def __init__(self, display_name: str, progress_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._display_name, self._limit_seconds, self._clock = display_name, progress_seconds, clock
        self._seconds = self._silent_seconds = 0.0
        self._bytes = self._bytes_of_try = 0
        self._checked_at = clock()

    def start_try(self) -> None:
        """Let time count again, and bytes from 0 on."""
        self._checked_at, self._bytes_of_try = self._clock(), 0

    def check(self, received_bytes: int) -> None:
        """Raise if a deadline has passed.

        Args:
            received_bytes: body bytes of this try so far.
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
    """One try, on a thread of its own."""

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
        """Return the answer, or the error: one that is raised comes from the caller's side of the wait."""
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
    """Run a try to its end.

    Raises:
        FetchTimeoutError: a deadline passed.
        RankloadError: whatever ``report`` raises.
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
        deadline.check(
            pending_read.received_bytes
        )  # the socket's own timeout may be as long: not worth another try then
    return outcome
