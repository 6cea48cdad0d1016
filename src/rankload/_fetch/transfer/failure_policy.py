"""Decide how a transfer goes on after a failure, and how long it waits."""

from __future__ import annotations

import time

from rankload._fetch.transfer.retry import Retries
from rankload._settings import Settings
from rankload.errors import FetchError

#: So much since the last failure, and the failures before are history: an origin that cuts every connection is borne
#: with as long as it gives something.
_PROGRESS_BYTES = 64 << 10


class Restart(Exception):
    """The bytes so far are of no use: start over.

    Attributes:
        is_whole: ask for the whole file in one request, without ranges.
        pause_seconds: before that.
        error: what led to it, None for a reason that is no failure.
    """

    def __init__(self, error: FetchError | None, *, is_whole: bool, pause_seconds: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.is_whole, self.pause_seconds = error, is_whole, pause_seconds


class Failures:
    """Counts failures of a transfer, as far as they say that no more tries are worth while.

    Args:
        retries: counts failures; some may be there from an earlier go.
        settings: deadlines.
        done_bytes: what was there at the beginning.
    """

    def __init__(self, retries: Retries, settings: Settings, done_bytes: int) -> None:
        self._retries, self._settings = retries, settings
        self._hold_until = self._failed_at = 0.0
        self._bytes_at_failure = self._bytes_at_unusable_range = done_bytes
        self._unusable_ranges = 0

    def hold(self, error: FetchError) -> None:
        """Let no request be sent for as long as the origin asks, if it does."""
        asked = error.fields.get("retry_after_seconds")
        if asked is not None:
            self._hold_until = time.monotonic() + min(asked, self._settings.retry_after_seconds)

    def hold_seconds(self) -> float:
        """Return for how long no request may be sent."""
        return max(0.0, self._hold_until - time.monotonic())

    def pause_after(self, error: FetchError, done_bytes: int, *, asked_at: float, is_resumed: bool) -> float:
        """Return how long to wait before the next try.

        Args:
            error: how the last one failed.
            done_bytes: what is there.
            asked_at: when it had sent its request. All that were under way when one failed are one failure: a switch
                that is restarted breaks every connection.
            is_resumed: what is there stays.

        Raises:
            FetchError: the one given, if another try is in vain or there were enough.
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
        """Return how many range requests in a row had an answer that makes no sense, with next to nothing in between.

        One bad server of many, or a bad moment, is no reason to drop all that came.
        """
        if done_bytes - self._bytes_at_unusable_range >= _PROGRESS_BYTES:
            self._unusable_ranges = 0
        self._bytes_at_unusable_range = done_bytes
        self._unusable_ranges += 1
        return self._unusable_ranges
