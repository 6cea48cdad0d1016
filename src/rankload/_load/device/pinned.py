"""Stage bytes through pinned memory: threads fill some buffers while others are copied to the device.

A copy out of pageable memory, which is what a mapped file is, goes at the speed of one core: 7 GB/s where pinned memory
gives 46 (H100, PCIe 5).
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

#: Of each buffer. 1.19 GB into a module on an H100 took 0.11 s the first time and 0.06 s from then on; with 4 MiB 0.15
#: and 0.11, with 16 MiB 0.12 and 0.05. (Pinning costs half a millisecond a MiB; torch keeps what is pinned.)
BUFFER_BYTES = 8 << 20


class Job(Protocol):
    """What is to be read into one buffer."""

    def __len__(self) -> int:
        """Return its bytes; at most `BUFFER_BYTES`."""

    def fill(self, address: int) -> None:
        """Read them to an address. Called in a thread."""


JobType = TypeVar("JobType", bound=Job)


def is_staged(device: torch.device) -> bool:
    """Return whether a device is there, and filled in this way: an accelerator with streams and pinned memory.

    Not Apple's: its memory is the CPU's, and what torch pins for it is no memory of the CPU's.
    """
    if device.type in ("cpu", "meta", "mps"):
        return False
    accelerator = visible_accelerator()
    return accelerator is not None and device.type == accelerator.type and (device.index or 0) < accelerator.count


def use_in_thread(device: torch.device) -> None:
    """Make a device this thread's: a thread begins on the first one, and would make a context there."""
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

    Copies out of them that have been put on the device's current stream before the next is asked for may still run
    then.

    Args:
        jobs: what to read.
        device: where the copies go: one that `is_staged`, or the CPU, for which nothing is pinned.
        limits: how many threads read, and how long a file may not answer.
        check_cancelled: called now and then while a file does not answer; raises what ends the wait.
        display_name: the checkpoint, for messages.

    Raises:
        ProgressTimeoutError: a file does not answer.
        Exception: whatever a job has raised.
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
                buffer.wait()  # what has been copied before this one lies before it in the stream


class _Buffer:
    """Pinned memory, and when it may be written to again.

    The thread that fills it first makes it: pinning takes its time, and others read meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: torch.Tensor | None = None
        self._copied: torch.Event | None = None

    @property
    def content(self) -> torch.Tensor:
        """Return the memory, ``uint8[BUFFER_BYTES]``."""
        if self._memory is None:
            self._memory = _pinned() if self._device.type != "cpu" else _unpinned()
        return self._memory

    def fill(self, job: Job) -> None:
        """Read a job's bytes when the copies of what was here before have ended."""
        use_in_thread(self._device)
        self.wait()
        job.fill(self.content.data_ptr())

    def note_copies(self) -> None:
        """Take note that copies out of it may be under way."""
        if self._device.type != "cpu":
            self._copied = torch.Event(self._device)
            self._copied.record(torch.accelerator.current_stream(self._device))

    def wait(self) -> None:
        """Wait until they have ended."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def _pinned() -> torch.Tensor:
    try:
        return torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:  # a limit on locked memory; copies from other memory are slower, and as good
        _logger.debug("%d bytes cannot be pinned: %s", BUFFER_BYTES, error)
        return _unpinned()


def _unpinned() -> torch.Tensor:
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu")
