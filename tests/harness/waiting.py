"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.002


def wait_until(predicate: Callable[[], Any], timeout_seconds: float, what: str) -> Any:
    """Waits until ``predicate()`` is true, and returns its value. ``what`` names it in the error."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)
    return value
