"""A thread for blocking calls."""

from __future__ import annotations

import gc
import threading

import pytest

from harness.waiting import wait_until
from rankload._platform.daemon_threads import DeadlineThread


def test_an_interrupt_while_it_starts_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_and_interrupt(thread: threading.Thread) -> None:
        started(thread)
        raise KeyboardInterrupt

    def has_ended() -> bool:
        gc.collect()
        return all(thread.name != "interrupted" for thread in threading.enumerate())

    started = threading.Thread.start
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            DeadlineThread("interrupted")
    wait_until(has_ended, 10, "the thread to end")
