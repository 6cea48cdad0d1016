"""Decide whether a transfer continues after a failure, and how long it waits before that."""

from __future__ import annotations

import time

from rankload._fetch.transfer.retry import Retries
from rankload._settings import Settings
from rankload.errors import FetchError

#: Bytes since the last failure after which earlier failures no longer count. So an origin that cuts every connection is
#: tolerated as long as bytes come.
_PROGRESS_BYTES = 64 << 10


class Restart(Exception):
    """The bytes so far are useless: start over.

    Attributes:
        is_whole: whether to request the whole file at once, without ranges.
        pause_seconds: seconds to wait before the restart.
        error: the failure that led to the restart; None if none did.
    """

    def __init__(self, error: FetchError | None, *, is_whole: bool, pause_seconds: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.is_whole, self.pause_seconds = error, is_whole, pause_seconds


class Failures:
    """Counts the failures of a transfer, to decide when more attempts are pointless.

    Args:
        retries: counter of failures; may hold failures of an earlier attempt.
        settings: deadlines.
        done_bytes: number of bytes at the beginning.
    """

    def __init__(self, retries: Retries, settings: Settings, done_bytes: int) -> None:
        self._retries, self._settings = retries, settings
        self._hold_until = self._failed_at = 0.0
        self._bytes_at_failure = self._bytes_at_unusable_range = done_bytes
        self._unusable_ranges = 0

    def hold(self, error: FetchError) -> None:
        """If the origin sent Retry-After, hold all requests for that long, up to a limit."""
        asked = error.fields.get("retry_after_seconds")
        if asked is not None:
            self._hold_until = time.monotonic() + min(asked, self._settings.retry_after_seconds)

    def hold_seconds(self) -> float:
        """Return how long no request may be sent, in seconds."""
        return max(0.0, self._hold_until - time.monotonic())

    def pause_after(self, error: FetchError, done_bytes: int, *, asked_at: float, is_resumed: bool) -> float:
        """Return how long to wait before the next attempt, in seconds.

        Args:
            error: error of the last attempt.
            done_bytes: number of bytes that have come.
            asked_at: time at which the failed request was sent. Requests that were running when another failed count as
                the same failure: a restarted switch breaks every connection.
            is_resumed: whether the next attempt keeps the bytes that have come.

        Raises:
            FetchError: ``error``, if another attempt is pointless, or if there were enough.
        """
        is_new = asked_at >= self._failed_at
        if is_new:
            self._failed_at = time.monotonic()
            has_progress = done_bytes - self._bytes_at_failure >= _PROGRESS_BYTES
            if has_progress and is_resumed and not error.fields.get("is_too_slow"):
                self._retries.succeeded()
            self._bytes_at_failure = done_bytes
        return self._retries.pause_after(error, is_new=is_new)

    def count_unusable_range(self, done_bytes: int) -> int:
        """Count an invalid response to a range request; return how many came in a row, with little progress in between.

        One bad server of many, or a bad moment, is no reason to drop all bytes.
        """
        if done_bytes - self._bytes_at_unusable_range >= _PROGRESS_BYTES:
            self._unusable_ranges = 0
        self._bytes_at_unusable_range = done_bytes
        self._unusable_ranges += 1
        return self._unusable_ranges
