"""Fill storages on accelerators after torch.load has made the tensors, from many threads.

torch.load copies each out of the mapped file, which is pageable memory, at the speed of one core.
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankload._load.device.map_location import location_of, restore_of
from rankload._load.device.pinned import BUFFER_BYTES, is_staged, staged
from rankload._load.device.readers import Limits


class DeferredStorages:
    """Puts storages where a ``map_location`` says, but those on accelerators without their content, at first.

    Only for what does not look at the elements of a tensor before all of them are there.

    Args:
        map_location: one that `goes_by_tags`.
    """

    def __init__(self, map_location: Any) -> None:
        self._restore = restore_of(map_location)
        self._late_device = functools.cache(lambda tag: _late_device(location_of(map_location, tag)))
        self._pairs: dict[torch.device, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = defaultdict(list)

    def __call__(self, storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        """Return a storage in the right place; see `Restore`."""
        device = self._late_device(tag)
        if device is None:
            return self._restore(storage, tag)
        empty = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        self._pairs[empty.device].append((empty, storage))
        return empty

    def fill(self, limits: Limits, check_cancelled: Callable[[], None], display_name: str) -> None:
        """Copy what belongs into the storages that were made.

        Args:
            limits: how many threads read, and how long a file may not answer.
            check_cancelled: called now and then while a file does not answer; raises what ends the wait.
            display_name: the checkpoint, for messages.
        """
        for device, pairs in self._pairs.items():
            for job, content in staged(_jobs(pairs), device, limits, check_cancelled, display_name):
                for piece, begin in zip(job.pieces, job.begins, strict=True):
                    target = torch.empty(0, dtype=torch.uint8, device=device).set_(piece.storage)
                    part = content.narrow(0, begin, piece.length)
                    target.narrow(0, piece.offset, piece.length).copy_(part, non_blocking=True)
        self._pairs.clear()


def _late_device(location: str) -> torch.device | None:
    """Return a location's device, if storages there are filled late."""
    try:
        device = torch.device(location)
    except RuntimeError:  # a tag of older files, or of torch.serialization.register_package
        return None
    return device if is_staged(device) else None


@dataclass(frozen=True)
class _Piece:
    """Bytes of a storage on a device, and the one in memory that has them, which a thread that reads keeps mapped."""

    storage: torch.UntypedStorage
    source: torch.UntypedStorage
    offset: int
    length: int


@dataclass(frozen=True)
class _Pieces:
    """As many as go into a buffer, one after the other."""

    pieces: Sequence[_Piece]

    def __len__(self) -> int:
        return sum(piece.length for piece in self.pieces)

    @property
    def begins(self) -> list[int]:
        """Return where each begins in the buffer."""
        begins = [0]
        for piece in self.pieces[:-1]:
            begins.append(begins[-1] + piece.length)
        return begins

    def fill(self, address: int) -> None:
        for piece in self.pieces:
            ctypes.memmove(address, piece.source.data_ptr() + piece.offset, piece.length)
            address += piece.length


def _jobs(pairs: Sequence[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> Iterator[_Pieces]:
    pieces: list[_Piece] = []
    room = BUFFER_BYTES
    for empty, full in pairs:
        done = 0
        while done < full.nbytes():
            length = min(room, full.nbytes() - done)
            pieces.append(_Piece(empty, full, done, length))
            done, room = done + length, room - length
            if not room:
                yield _Pieces(pieces)
                pieces, room = [], BUFFER_BYTES
    if pieces:
        yield _Pieces(pieces)
