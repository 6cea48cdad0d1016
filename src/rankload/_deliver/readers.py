"""Threads that read files. Daemons, joined by nobody: a file server that hangs must not keep a rank from failing."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from rankload._types import Identity

#: More than these read a page cache no faster (H100 host of 16 cores: 6 GB/s with one, 19 with 4, 28 with 8, 22 with
#: 16).
_MOST_THREADS = 8


def thread_count(identity: Identity) -> int:
    """Return how many threads this rank may keep busy: its share of the cores that it may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_THREADS, cores // (identity.local_world_size or identity.world_size)))


class Readers:
    """A few threads, and a queue of what they are to read. Use as a context manager; leaving it cancels the rest."""

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], Future[None]] | None] = queue.SimpleQueue()
        self._futures: list[Future[None]] = []
        self._count = count

    def submit(self, read: Callable[[], object]) -> Future[None]:
        """Have it called in a thread."""
        future: Future[None] = Future()
        self._futures.append(future)
        self._tasks.put((read, future))
        return future

    def __enter__(self) -> Readers:
        for _ in range(self._count):
            threading.Thread(target=self._run, name="rankload-reader", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for future in self._futures:
            future.cancel()
        for _ in range(self._count):
            self._tasks.put(None)

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
