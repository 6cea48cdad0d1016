"""Read files on daemon threads: a hanging file server must not keep a rank from failing."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from rankload._platform.clock import SuspendAwareTimer
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import ProgressTimeoutError

#: Most reader threads. More do not read the page cache faster (H100 host of 16 cores: 6 GB/s with 1, 19 with 4, 28 with
#: 8, 22 with 16).
_MAX_THREADS = 8

#: Interval between two checks for cancellation while a file does not answer.
_LOOK_SECONDS = 0.5

#: The most that one check may count towards the deadline, even if a scheduler suspended the job for an hour.
_MAX_SECONDS = 1.0

#: How long a failing call waits for its threads. A thread that wakes in torch during interpreter exit aborts the
#: process.
_LEAVE_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """Limits on a rank's reads.

    Attributes:
        thread_count: number of reader threads.
        progress_seconds: longest time without progress.
    """

    thread_count: int
    progress_seconds: float

    @classmethod
    def of(cls, identity: Identity, settings: Settings) -> Limits:
        """Return the limits of a rank: one thread per core of its share."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cores // (identity.local_world_size or identity.world_size)
        return cls(max(1, min(_MAX_THREADS, share)), settings.progress_seconds)


class Readers:
    """Reader threads with a queue of reads. Use as a context manager; leaving it cancels the queued reads."""

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], Future[None]] | None] = queue.SimpleQueue()
        self._unfinished: set[Future[None]] = set()
        self._count = count

    def submit(self, read: Callable[[], object]) -> Future[None]:
        """Queue a read, which a thread then calls."""
        future: Future[None] = Future()
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        self._tasks.put((read, future))
        return future

    def __enter__(self) -> Readers:
        for _ in range(self._count):
            threading.Thread(target=self._run, name="rankload-reader", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for future in list(self._unfinished):
            future.cancel()
        for _ in range(self._count):
            self._tasks.put(None)
        wait(list(self._unfinished), timeout=_LEAVE_SECONDS)

    def _run(self) -> None:
        while task := self._tasks.get():
            read, future = task
            if future.set_running_or_notify_cancel():
                try:
                    read()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(None)


def await_reader(
    future: Future[None], check_cancelled: Callable[[], None], progress_seconds: float, display_name: str
) -> None:
    """Wait until a thread has finished a read. Raise the read's error, if any.

    Args:
        future: the read.
        check_cancelled: called repeatedly; raises another rank's error.
        progress_seconds: deadline, in seconds during which this process was awake.
        display_name: name of the file, for the message.

    Raises:
        ProgressTimeoutError: the file did not answer before the deadline.
    """
    waited = SuspendAwareTimer(_MAX_SECONDS)
    while not wait([future], timeout=min(_LOOK_SECONDS, progress_seconds)).done:
        check_cancelled()
        waited.count()
        if waited.seconds >= progress_seconds:
            raise ProgressTimeoutError(
                f"{display_name}: no byte was read for {waited.seconds:.0f} s: a hung filesystem; raise timeout= "
                "if this is normal here",
                path=display_name,
            )
    future.result()
