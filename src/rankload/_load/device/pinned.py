"""Stage bytes through pinned memory: threads fill some buffers while others are copied to the device.

A copy from pageable memory, such as a mapped file, runs at the speed of one core: 7 GB/s. Pinned memory reaches 46 GB/s
(H100, PCIe 5).
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Protocol, TypeVar

import torch

from rankload._load.device.devices import visible_accelerator
from rankload._load.device.readers import Limits, Readers, await_reader

_logger = logging.getLogger("rankload")

#: Size of each buffer. 1.19 GB into a module on an H100 took 0.11 s the first time and 0.06 s from then on; with 4 MiB
#: 0.15 and 0.11, with 16 MiB 0.12 and 0.05. (Pinning costs half a millisecond per MiB; torch caches pinned memory.)
BUFFER_BYTES = 8 << 20


class Job(Protocol):
    """The bytes to read into one buffer."""

    def __len__(self) -> int:
        """Return the number of bytes, at most `BUFFER_BYTES`."""

    def fill(self, address: int) -> None:
        """Read the bytes to an address in memory. Called on a reader thread."""


JobType = TypeVar("JobType", bound=Job)


def is_staged(device: torch.device) -> bool:
    """Return whether a device exists and is filled through pinned memory: an accelerator with streams.

    Not Apple's MPS, which shares the CPU's memory, and whose pinned memory is not CPU memory.
    """
    if device.type in ("cpu", "meta", "mps"):
        return False
    accelerator = visible_accelerator()
    return accelerator is not None and device.type == accelerator.type and (device.index or 0) < accelerator.count


def use_in_thread(device: torch.device) -> None:
    """Make a device the current one of this thread. A new thread starts on device 0, and would make a context there."""
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)


def staged(
    jobs: Iterable[JobType],
    device: torch.device,
    limits: Limits,
    check_cancelled: Callable[[], None],
    display_name: str,
) -> Iterator[tuple[JobType, torch.Tensor]]:
    """Yield each job, in order, with its bytes: ``uint8[len(job)]``, pinned.

    Enqueue copies out of the bytes on the device's current stream before requesting the next job. The copies may still
    run afterwards.

    Args:
        jobs: the bytes to read.
        device: device of the copies: one that `is_staged`, or the CPU, for which nothing is pinned.
        limits: number of reader threads, and longest time without progress.
        check_cancelled: called repeatedly during the wait for a file; an error that it raises ends the wait.
        display_name: name of the checkpoint, for messages.

    Raises:
        ProgressTimeoutError: a file does not answer.
        Exception: the error of a job.
    """
    rest = iter(jobs)
    under_way: deque[tuple[JobType, _Buffer, Future[None]]] = deque()
    with Readers(limits.thread_count) as readers:

        def begin_next(buffer: _Buffer) -> None:
            for job in itertools.islice(rest, 1):
                under_way.append((job, buffer, readers.submit(partial(buffer.fill, job))))

        for _ in range(limits.thread_count + 1):
            begin_next(_Buffer(device))
        while under_way:
            job, buffer, future = under_way.popleft()
            await_reader(future, check_cancelled, limits.progress_seconds, display_name)
            yield job, buffer.content.narrow(0, 0, len(job))
            buffer.note_copies()
            begin_next(buffer)
            if not under_way:
                buffer.wait()  # all earlier copies come before this one in the stream


class _Buffer:
    """Pinned memory that tracks when it may be written to again.

    The thread that fills the buffer first allocates it: pinning takes time, and other threads read meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: torch.Tensor | None = None
        self._copied: torch.Event | None = None

    @property
    def content(self) -> torch.Tensor:
        """The memory, ``uint8[BUFFER_BYTES]``."""
        if self._memory is None:
            self._memory = _pinned() if self._device.type != "cpu" else _unpinned()
        return self._memory

    def fill(self, job: Job) -> None:
        """Read a job's bytes, after all copies out of the buffer have ended."""
        use_in_thread(self._device)
        self.wait()
        job.fill(self.content.data_ptr())

    def note_copies(self) -> None:
        """Record that copies out of the buffer may be running."""
        if self._device.type != "cpu":
            self._copied = torch.Event(self._device)
            self._copied.record(torch.accelerator.current_stream(self._device))

    def wait(self) -> None:
        """Wait until the recorded copies have ended."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def _pinned() -> torch.Tensor:
    try:
        return torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:  # a limit on locked memory; copies from pageable memory are slower, but correct
        _logger.debug("%d bytes cannot be pinned: %s", BUFFER_BYTES, error)
        return _unpinned()


def _unpinned() -> torch.Tensor:
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu")
