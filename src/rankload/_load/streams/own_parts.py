"""Upload a rank's own regions of tensors to its accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rankload._load.device.pinned import BUFFER_BYTES, is_staged, staged
from rankload._load.device.readers import Limits
from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.regions import runs

#: Shortest run that is worth its own system call.
_MIN_RUN_BYTES = 4096


def is_of_long_runs(copy: TensorCopy) -> bool:
    """Return whether `upload_parts` suits a copy: long runs in the file, and a contiguous destination."""
    saved, destination = copy.saved.in_file, copy.destination
    if saved is None or not is_staged(destination.device) or copy.saved.dtype != saved.dtype:
        return False
    if not (saved.is_here and saved.is_native and saved.entry.is_contiguous and destination.is_contiguous()):
        return False
    run_bytes = runs(saved.entry.shape, copy.region).length * saved.dtype.itemsize
    return run_bytes >= min(_MIN_RUN_BYTES, copy.region.element_count * saved.dtype.itemsize)


def upload_parts(
    copies: Sequence[TensorCopy], device: torch.device, limits: Limits, report: Callable[[int], None]
) -> int:
    """Read parts into tensors on one accelerator; return the bytes that were read.

    The device holds at most one buffer besides the tensors, and only to convert dtypes.

    Args:
        copies: copies for which `is_of_long_runs` is True.
        device: device of all destinations.
        limits: number of reader threads, and longest time without progress.
        report: called with the bytes done so far.
    """
    display_name = next(copy.saved.in_file.files.display_name for copy in copies if copy.saved.in_file is not None)
    jobs = (job for copy in copies for job in _jobs(copy))
    done = 0

    def check_cancelled() -> None:
        report(done)

    for job, content in staged(jobs, device, limits, check_cancelled, display_name):
        elements = content.view(job.saved.dtype)
        if job.destination.dtype != elements.dtype:  # convert on the device: a converted copy here would not be pinned
            elements = elements.to(device, non_blocking=True)
        job.destination.copy_(elements, non_blocking=True)
        done += len(job)
        check_cancelled()
    return done


@dataclass(frozen=True)
class _Runs:
    """Runs of a tensor that fit into one buffer.

    Attributes:
        saved: the tensor.
        pieces: offset in the file and length of each run, both in bytes.
        destination: destination of the runs, ``[elements]``.
    """

    saved: FileTensor
    pieces: Sequence[tuple[int, int]]
    destination: torch.Tensor

    def __len__(self) -> int:
        return sum(length for _, length in self.pieces)

    def fill(self, address: int) -> None:
        for offset, length in self.pieces:
            self.saved.read_bytes(address, offset, length)
            address += length


def _jobs(copy: TensorCopy) -> Iterator[_Runs]:
    saved, destination = copy.saved.in_file, copy.destination.view(-1)
    assert saved is not None
    done = 0
    for pieces in _filling(_pieces(saved, copy), BUFFER_BYTES):
        count = sum(length for _, length in pieces) // saved.dtype.itemsize
        yield _Runs(saved, pieces, destination.narrow(0, done, count))
        done += count


def _pieces(saved: FileTensor, copy: TensorCopy) -> Iterator[tuple[int, int]]:
    """Yield offset in the file and length in bytes of each run of the region."""
    found, item_bytes = runs(saved.entry.shape, copy.region), saved.dtype.itemsize
    for start in found.starts:
        yield saved.entry.offset + start * item_bytes, found.length * item_bytes


def _filling(pieces: Iterator[tuple[int, int]], capacity: int) -> Iterator[list[tuple[int, int]]]:
    """Cut and group pieces so that each group fills a buffer. The capacity must be a multiple of every element size."""
    group: list[tuple[int, int]] = []
    room = capacity
    for offset, length in pieces:
        while length:
            taken = min(length, room)
            group.append((offset, taken))
            offset, length, room = offset + taken, length - taken, room - taken
            if not room:
                yield group
                group, room = [], capacity
    if group:
        yield group
