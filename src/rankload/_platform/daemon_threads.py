"""Run blocking calls on a daemon thread, with a deadline.

A TCPStore client waits for its server's answer in recv(2), without a timeout and without running Python's signal
handlers. The store's own timeout bounds only how long the server waits for a key. If the server's process is frozen, or
its node has lost power, the client waits forever.
"""

from __future__ import annotations

import ctypes
import math
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

#: Waits are counted in slices. If a scheduler suspends the job for an hour, only one slice of that hour counts.
_SLICE_SECONDS = 0.5

#: Length of a slice when the caller passes ``on_wait``.
_LOOK_SECONDS = 0.1


class DeadlineThread:
    """A daemon thread that runs calls one at a time, in order, each with a time limit.

    Args:
        name: name of the thread, for stack dumps.
    """

    def __init__(self, name: str = "rankload-store") -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._overdue: Job | None = None
        self._end = weakref.finalize(self, self._jobs.put, None)  # first: a signal handler may raise during the start
        # daemon: a call that never returns must not keep the process from exiting
        threading.Thread(target=_run, args=(self._jobs,), name=name, daemon=True).start()

    def close(self) -> None:
        """End the thread after the last call has returned. The garbage collector does the same."""
        self._end()

    def ends_overdue_call(self, seconds: float) -> bool:
        """Wait for a call that has exceeded its limit. Return whether it has ended, or there is none."""
        return self._overdue is None or self._overdue.ends_within(seconds)

    def start(self, operation: Callable[[], Any]) -> Job:
        """Run an operation on the thread without waiting for it. Until it ends, it counts as overdue."""
        self._overdue = job = Job(operation)
        self._jobs.put(job)
        return job

    def call(
        self,
        operation: Callable[[], T],
        limit_seconds: float = math.inf,
        on_wait: Callable[[], None] | None = None,
    ) -> T:
        """Run an operation on the thread. Return its result, or raise its error.

        Args:
            operation: the blocking call.
            limit_seconds: how long to wait for the operation.
            on_wait: called on this thread ten times a second during the wait; an error that it raises ends the wait.

        Raises:
            TimeoutError: this operation, or an earlier one, exceeded its limit. That operation may still end later.
        """
        if self._overdue is not None and not self._overdue.ends_within(0):
            raise TimeoutError("still no answer to an earlier request")
        job = Job(operation)
        self._jobs.put(job)
        left, slice_seconds = limit_seconds, _SLICE_SECONDS if on_wait is None else _LOOK_SECONDS
        try:
            while not job.ends_within(min(left, slice_seconds)):
                left -= slice_seconds
                if left <= 0:
                    raise TimeoutError(f"no answer within {limit_seconds:g} s")
                if on_wait is not None:
                    on_wait()
        except BaseException:  # also what a signal handler raises during the wait
            self._overdue = job
            raise
        if job.error is not None:
            raise job.error
        return job.value  # type: ignore[no-any-return]


class Job:
    """A call, and a lock that is held until the call has ended. An Event would cost seven times as much (3 µs).

    Attributes:
        has_ended: whether the call has returned or raised.
        value: what it returned.
        error: what it raised; None if it returned.
    """

    def __init__(self, operation: Callable[[], Any]) -> None:
        self.operation = operation
        self.running = threading.Lock()
        self.running.acquire()
        self.has_ended = False
        self.value: Any = None
        self.error: Exception | None = None

    def ends_within(self, seconds: float) -> bool:
        """Wait for the call, and return whether it has ended."""
        # a signal handler may raise after acquire: the lock then stays held, so only has_ended can be believed
        if not self.has_ended and self.running.acquire(timeout=seconds):
            self.running.release()
        return self.has_ended


def _run(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job.value = job.operation()
        except Exception as error:
            job.error = error
        job.has_ended = True
        job.running.release()
        del job  # or the job and its result would live until the next call


def park_terminated_threads() -> None:
    """Let std::terminate put its thread to sleep instead of ending the process by SIGABRT. For the end of the process.

    A daemon thread may be inside C++ while the interpreter is torn down. When it then asks for the interpreter's lock,
    CPython ends the thread by pthread_exit (up to 3.13; later versions let it hang, gh-87135). C++ takes that for an
    exception that nobody catches, and calls std::terminate.
    """
    with suppress(OSError, AttributeError):  # another C++ library
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(ctypes.CDLL(None).pause)
