"""Blocking calls with a deadline, each on a daemon thread of its own.

A TCPStore client waits for its server's answer in recv(2), without a timeout and deaf to Python's signal handlers
(the store's own timeout bounds only how long the server waits for a key). Where the server's process is frozen, or
its node has lost power, that is forever.
"""

from __future__ import annotations

import math
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

#: The wait is counted in slices: of an hour for which a scheduler suspends the job, only one counts.
_SLICE_SECONDS = 0.5

#: The same where the caller wants to look at something meanwhile.
_LOOK_SECONDS = 0.1


class DeadlineThread:
    """Runs calls one after the other, in the order in which they were made, each within a time limit.

    Args:
        name: the thread's, for stack dumps.
    """

    def __init__(self, name: str = "rankload-store") -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._overdue: _Job | None = None
        # a daemon: a call that never returns must not keep the process from ending
        threading.Thread(target=_run, args=(self._jobs,), name=name, daemon=True).start()
        self._end = weakref.finalize(self, self._jobs.put, None)

    def close(self) -> None:
        """End the thread, once the last call has returned. Without it, the garbage collector does."""
        self._end()

    def ends_overdue_call(self, seconds: float) -> bool:
        """Wait for a call that has exceeded its limit; tell whether none is under way any more."""
        return self._overdue is None or self._overdue.ends_within(seconds)

    def call(
        self,
        operation: Callable[[], T],
        limit_seconds: float = math.inf,
        on_wait: Callable[[], None] | None = None,
    ) -> T:
        """Return or raise what the operation does.

        Args:
            operation: the blocking call.
            limit_seconds: how long to wait for it.
            on_wait: called on this thread ten times a second meanwhile; what it raises ends the wait.

        Raises:
            TimeoutError: it did not end within the limit, or a former one still has not. It may end later.
        """
        if self._overdue is not None and not self._overdue.ends_within(0):
            raise TimeoutError("still no answer to an earlier request")
        job = _Job(operation)
        self._jobs.put(job)
        left, slice_seconds = limit_seconds, _SLICE_SECONDS if on_wait is None else _LOOK_SECONDS
        while not job.ends_within(min(left, slice_seconds)):
            left -= slice_seconds
            if left <= 0:
                self._overdue = job
                raise TimeoutError(f"no answer within {limit_seconds:g} s")
            if on_wait is not None:
                try:
                    on_wait()
                except BaseException:
                    self._overdue = job
                    raise
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
