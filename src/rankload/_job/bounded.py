"""Blocking calls into C++ with a deadline: they run on a thread of their own.

A TCPStore client waits for its server's answer in recv(2), without a timeout and deaf to Python's signal handlers
(the store's own timeout bounds only how long the server waits for a key). Where the server's process is frozen, or
its node has lost power, that is for ever.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

#: The wait is counted in slices: of an hour for which a scheduler suspends the job, only one counts.
_SLICE_SECONDS = 0.5


class BoundedCalls:
    """Runs calls one after the other, in the order in which they were made, each within a time limit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._overdue: _Job | None = None
        # a daemon: a call that never returns must not keep the process from ending
        threading.Thread(target=_run, args=(self._jobs,), name="rankload-store", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def call(self, operation: Callable[[], T], limit_seconds: float) -> T:
        """Return or raise what the operation does.

        Raises:
            TimeoutError: it did not end within the limit, or a former one still has not. It may end later.
        """
        if self._overdue is not None and not self._overdue.ends_within(0):
            raise TimeoutError("still no answer to an earlier request")
        job = _Job(operation)
        self._jobs.put(job)
        left = limit_seconds
        while not job.ends_within(min(left, _SLICE_SECONDS)):
            left -= _SLICE_SECONDS
            if left <= 0:
                self._overdue = job
                raise TimeoutError(f"no answer within {limit_seconds:g} s")
        if job.error is not None:
            raise job.error
        return job.value  # type: ignore[no-any-return]


class _Job:
    """A call, and a lock that is held until it has ended: an Event would cost seven times as much (3 µs)."""

    def __init__(self, operation: Callable[[], Any]) -> None:
        self.operation = operation
        self.running = threading.Lock()
        self.running.acquire()
        self.has_ended = False
        self.value: Any = None
        self.error: Exception | None = None

    def ends_within(self, seconds: float) -> bool:
        """Wait; tell whether the call has ended."""
        # a signal may raise between these two: the lock then stays held, and says nothing any more
        if not self.has_ended and self.running.acquire(timeout=seconds):
            self.running.release()
        return self.has_ended


def _run(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job.value = job.operation()
        except Exception as error:
            job.error = error
        job.has_ended = True
        job.running.release()
        del job  # or what it refers to would live until the next call
