"""Pinned memory on the way from a file to an accelerator: threads fill some buffers while others are copied.

A copy out of pageable memory, which is what a mapped file is, goes at the speed of one core: 7 GB/s where pinned memory
gives 46 (H100, PCIe 5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Protocol, TypeVar

import torch

from rankload._deliver.readers import Readers

#: Of each buffer. 1.19 GB into a module on an H100 took 0.11 s the first time and 0.06 s from then on; with 4 MiB 0.15
#: and 0.11, with 16 MiB 0.12 and 0.05. (Pinning costs half a millisecond a MiB; torch keeps what is pinned.)
BUFFER_BYTES = 8 << 20

#: Between two signs of life while a file does not answer.
_LOOK_SECONDS = 0.5


class Job(Protocol):
    """What is to be read into one buffer."""

    def __len__(self) -> int:
        """Return its bytes; at most `BUFFER_BYTES`."""

    def fill(self, address: int) -> None:
        """Read them to an address. Called in a thread."""


JobType = TypeVar("JobType", bound=Job)


def staged(
    jobs: Sequence[JobType], device: torch.device, thread_count: int, look: Callable[[], None]
) -> Iterator[tuple[JobType, torch.Tensor]]:
    """Yield each job, in order, with its bytes: ``uint8[len(job)]``, pinned.

    Copies out of them that have been put on the device's current stream before the next is asked for may still run
    then.

    Args:
        jobs: what to read.
        device: where the copies go; on the CPU nothing is pinned.
        thread_count: how many threads read.
        look: called now and then while a file does not answer; raises what ends the wait.

    Raises:
        Exception: whatever a job has raised.
    """
    thread_count = min(thread_count, len(jobs))
    buffers = [_Buffer(device) for _ in range(min(thread_count + 1, len(jobs)))]
    with Readers(thread_count) as readers:

        def submit(number: int) -> Future[None]:
            return readers.submit(partial(buffers[number % len(buffers)].fill, jobs[number]))

        under_way = deque(map(submit, range(len(buffers))))
        for number, job in enumerate(jobs):
            future, buffer = under_way.popleft(), buffers[number % len(buffers)]
            while not wait([future], timeout=_LOOK_SECONDS).done:
                look()
            future.result()
            yield job, buffer.content.narrow(0, 0, len(job))
            buffer.note_copies()
            if number + len(buffers) < len(jobs):
                under_way.append(submit(number + len(buffers)))
        for buffer in buffers:
            buffer.wait()


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
            is_pinned = self._device.type != "cpu"
            self._memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
        return self._memory

    def fill(self, job: Job) -> None:
        """Read a job's bytes when the copies of what was here before have ended."""
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
