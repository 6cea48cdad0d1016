"""Deadlines count the time for which a process is awake."""

from __future__ import annotations

import pytest

from rankload._platform import clock as awake


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(awake.time, "monotonic", lambda: clock[0])
    return clock


def test_an_hour_of_suspension_is_no_hour(now: list[float]) -> None:
    waited = awake.SuspendAwareTimer(longest_seconds=6)
    now[0] += 2
    assert (waited.uncounted_seconds, waited.seconds) == (2, 0)
    assert (waited.count(), waited.seconds, waited.uncounted_seconds) == (2, 2, 0)
    now[0] += 3600
    assert (waited.count(), waited.seconds) == (6, 8)
    now[0] += 1
    waited.restart()
    assert (waited.count(), waited.seconds) == (0, 0)


def test_progress_begins_anew_with_each_new_mark(now: list[float]) -> None:
    timer = awake.NoProgressTimer(0, longest_seconds=6)
    now[0] += 4
    assert timer.seconds_without_progress(0) == 4
    now[0] += 4
    assert timer.seconds_without_progress(17) == 0
    now[0] += 5
    assert timer.seconds_without_progress(17) == 5


def test_neither_a_suspension_nor_a_declared_pause_counts(now: list[float]) -> None:
    timer = awake.NoProgressTimer(0, longest_seconds=6)
    now[0] += 3600
    assert timer.seconds_without_progress(0) == 6
    now[0] += 5
    timer.restart()
    assert timer.seconds_without_progress(0) == 0
