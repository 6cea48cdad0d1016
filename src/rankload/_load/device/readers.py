"""Daemon threads that read files: a file server that hangs must not keep a rank from failing."""

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

#: More than these read a page cache no faster (H100 host of 16 cores: 6 GB/s with one, 19 with 4, 28 with 8, 22 with
#: 16).
_MAX_THREADS = 8

#: Between two signs of life while a file does not answer.
_LOOK_SECONDS = 0.5

#: What one look may count towards the deadline: of an hour for which a scheduler suspends the job, only that.
_MAX_SECONDS = 1.0

#: How long a call that fails waits for its threads: one that wakes in torch while the interpreter ends aborts it.
_LEAVE_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """What a rank may use up while it reads.

    Attributes:
        thread_count: threads.
        progress_seconds: time without progress.
    """

    thread_count: int
    progress_seconds: float

    @classmethod
    def of(cls, identity: Identity, settings: Settings) -> Limits:
        """Return a rank's: its share of the cores that it may run on."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cores // (identity.local_world_size or identity.world_size)
        return cls(max(1, min(_MAX_THREADS, share)), settings.progress_seconds)


class Readers:
    """A few threads, and a queue of what they are to read. Use as a context manager; leaving it cancels the rest."""

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], Future[None]] | None] = queue.SimpleQueue()
        self._unfinished: set[Future[None]] = set()
        self._count = count

    def submit(self, read: Callable[[], object]) -> Future[None]:
        """Have it called in a thread."""
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
    """Wait until a thread is through with a read; raise what it has raised.

    Args:
        future: the read.
        check_cancelled: called now and then; raises what another rank has failed with.
        progress_seconds: the deadline, of time for which this process was awake.
        display_name: the file, for the message.

    Raises:
        ProgressTimeoutError: the file has not answered within it.
    """
    waited = SuspendAwareTimer(_MAX_SECONDS)
    while not wait([future], timeout=min(_LOOK_SECONDS, progress_seconds)).done:
        check_cancelled()
        waited.count()
        if waited.seconds >= progress_seconds:
            raise ProgressTimeoutError(
                f"{display_name}: no byte of it has come for {waited.seconds:.0f} s: a hung filesystem; raise timeout= "
                "if this is normal here",
                path=display_name,
            )
    future.result()
