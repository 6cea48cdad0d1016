"""Decide which failures are retried, and after how long."""

from __future__ import annotations

import logging
import random
import time

from rankload._settings import Settings
from rankload._types import Progress, Report
from rankload.errors import FetchError, FetchTimeoutError, HTTPStatusError, NetworkError, TruncatedError

_logger = logging.getLogger("rankload")

#: Temporary statuses besides 5xx: Accepted (and not ready yet), Request Timeout, Too Early, Too Many Requests (RFC
#: 9110, RFC 8470, RFC 6585).
_TEMPORARY_CODES = frozenset({202, 408, 425, 429})

#: Not Implemented, HTTP Version Not Supported: a retry changes nothing.
_PERMANENT_CODES = frozenset({501, 505})

_MAX_PAUSE_SECONDS = 60.0

#: Time within which another rank's failure ends a pause.
_REPORT_SECONDS = 0.2

#: Far beyond the longest pause. A float overflows at 2 ** 1024.
_MAX_DOUBLINGS = 64


def is_temporary(error: FetchError) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, HTTPStatusError):
        return error.code in _TEMPORARY_CODES or (error.code >= 500 and error.code not in _PERMANENT_CODES)
    if isinstance(error, (NetworkError, FetchTimeoutError, TruncatedError)):
        return not error.fields.get("is_permanent")
    return False


class Retries:
    """Counts consecutive failures.

    Args:
        settings: number of retries, first pause, and limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._failures = 0

    def succeeded(self) -> None:
        """Reset the count: bytes came, so the next failure is the first one again."""
        self._failures = 0

    def pause_after(self, error: FetchError, *, is_new: bool = True) -> float:
        """Return how long to wait before the next attempt, in seconds.

        The pause grows exponentially with jitter, so that the nodes of a job do not come back together. If the origin
        sent ``Retry-After``, that counts, up to ``retry_after_seconds``.

        Args:
            error: error of the last attempt.
            is_new: False for an error that came along with another, and does not count.

        Raises:
            FetchError: ``error``, if another attempt is pointless, or if there were enough.
        """
        self._failures += is_new
        if not is_temporary(error) or self._failures > self._settings.retries:
            raise error
        doublings = min(self._failures - 1, _MAX_DOUBLINGS)
        pause: float = self._settings.backoff_seconds * 2**doublings * random.uniform(0.5, 1.0)  # noqa: S311
        asked = error.fields.get("retry_after_seconds")
        if asked is None:
            pause = min(pause, _MAX_PAUSE_SECONDS)
        else:  # wait a little longer: other clients may have been told the same second
            pause = min(float(asked), self._settings.retry_after_seconds) + min(pause, 1.0)
        if is_new:
            tries = f"{self._failures} of {self._settings.retries}"
            _logger.warning("%s; retrying in %.1f s (%s)", error.message, pause, tries)
        return pause


def pause(seconds: float, report: Report, attempt: int = 1) -> None:
    """Wait, and report the pause meanwhile. ``report`` raises if another rank fails."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        report(Progress("backoff", 0, None, attempt))
        time.sleep(min(left, _REPORT_SECONDS))
