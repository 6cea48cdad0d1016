"""Reading into the memory of an accelerator: through two pinned buffers, one filled while the other is copied.

The copies run on the device's current stream, on which nothing else runs during the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from rankload._deliver.boxes import runs
from rankload._deliver.saved import TensorInFile
from rankload._deliver.transfers import Transfer

#: Of each buffer.
_BUFFER_BYTES = 8 << 20

#: Shorter runs cost more system calls than they are worth.
_SHORTEST_RUN_BYTES = 4096


class Uploader:
    """Reads tensors of a file into tensors on one accelerator. Beyond these it needs one buffer there, at the most."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = itertools.cycle([_Buffer(device), _Buffer(device)])

    @staticmethod
    def takes(transfer: Transfer) -> bool:
        """Tell whether a transfer is one of those that this makes faster: of long runs, into memory in their order."""
        saved, destination = transfer.saved.in_file, transfer.destination
        if saved is None or destination.device.type in ("cpu", "meta") or transfer.saved.dtype != saved.dtype:
            return False
        if not (saved.is_here and saved.is_native and saved.entry.is_contiguous and destination.is_contiguous()):
            return False
        run_bytes = runs(saved.entry.shape, transfer.box).length * saved.dtype.itemsize
        return run_bytes >= min(_SHORTEST_RUN_BYTES, transfer.box.element_count * saved.dtype.itemsize)

    def upload(self, transfer: Transfer) -> int:
        """Begin with one; return the bytes that were read."""
        saved = transfer.saved.in_file
        assert saved is not None
        destination, done = transfer.destination.view(-1), 0
        item_bytes = saved.dtype.itemsize
        for pieces in _filling(_pieces(saved, transfer), _BUFFER_BYTES):
            buffer = next(self._buffers)
            length = buffer.fill(saved, pieces)
            elements = buffer.content.narrow(0, 0, length).view(saved.dtype)
            part = destination.narrow(0, done // item_bytes, elements.numel())
            self._copy(part, elements)
            buffer.note_copy()
            done += length
        return done

    def finish(self) -> None:
        """Wait until all is there."""
        for _ in range(2):
            next(self._buffers).wait()

    def _copy(self, part: torch.Tensor, elements: torch.Tensor) -> None:
        if part.dtype != elements.dtype:  # converted there: on this side the copy would no longer be from pinned memory
            elements = elements.to(self._device, non_blocking=True)
        part.copy_(elements, non_blocking=True)


class _Buffer:
    """Pinned memory, and when it may be written to again.

    Attributes:
        content: ``uint8[_BUFFER_BYTES]``.
    """

    def __init__(self, device: torch.device) -> None:
        self.content = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._device = device
        self._copied: torch.Event | None = None

    def fill(self, saved: TensorInFile, pieces: list[tuple[int, int]]) -> int:
        """Read pieces, each an offset in the file and a length in bytes, one behind the other; return their bytes."""
        self.wait()
        position = 0
        for offset, length in pieces:
            saved.read_bytes(self.content.data_ptr() + position, offset, length)
            position += length
        return position

    def note_copy(self) -> None:
        """Take note that a copy out of it has begun."""
        self._copied = torch.Event(self._device)
        self._copied.record(torch.accelerator.current_stream(self._device))

    def wait(self) -> None:
        """Wait until that has ended."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def _pieces(saved: TensorInFile, transfer: Transfer) -> Iterator[tuple[int, int]]:
    """Yield offset in the file and length in bytes of each run of the box."""
    found, item_bytes = runs(saved.entry.shape, transfer.box), saved.dtype.itemsize
    for start in found.starts:
        yield saved.entry.offset + start * item_bytes, found.length * item_bytes


def _filling(pieces: Iterator[tuple[int, int]], capacity: int) -> Iterator[list[tuple[int, int]]]:
    """Cut and group pieces so that each group fills a buffer; the capacity is a multiple of every element's size."""
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
