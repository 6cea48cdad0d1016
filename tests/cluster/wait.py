"""Waiting for what a test expects, always with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(condition: Callable[[], Value | None], seconds: float, failure: Callable[[], str]) -> Value:
    """Return the first true value of `condition`; after `seconds` fail with the text of `failure`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{failure()} (waited {seconds} s)")
        time.sleep(0.05)
    return value
