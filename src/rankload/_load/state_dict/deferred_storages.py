"""Fill storages on accelerators after torch.load has made the tensors, with several reader threads.

torch.load itself copies each storage out of the mapped file, which is pageable memory, at the speed of one core.
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
    """A restore function for ``map_location`` that fills storages on accelerators later.

    Only for loaders that do not look at elements before `fill`.

    Args:
        map_location: one that `goes_by_tags`.
    """

    def __init__(self, map_location: Any) -> None:
        self._restore = restore_of(map_location)
        self._late_device = functools.cache(lambda tag: _late_device(location_of(map_location, tag)))
        self._pairs: dict[torch.device, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = defaultdict(list)

    def __call__(self, storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        """Return a storage on its device, empty if that is an accelerator; see `Restore`."""
        device = self._late_device(tag)
        if device is None:
            return self._restore(storage, tag)
        empty = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        self._pairs[empty.device].append((empty, storage))
        return empty

    def fill(self, limits: Limits, check_cancelled: Callable[[], None], display_name: str) -> None:
        """Fill the empty storages.

        Args:
            limits: number of reader threads, and longest time without progress.
            check_cancelled: called repeatedly during the wait for a file; an error that it raises ends the wait.
            display_name: name of the checkpoint, for messages.
        """
        for device, pairs in self._pairs.items():
            for job, content in staged(_jobs(pairs), device, limits, check_cancelled, display_name):
                for piece, begin in zip(job.pieces, job.begins, strict=True):
                    target = torch.empty(0, dtype=torch.uint8, device=device).set_(piece.storage)
                    part = content.narrow(0, begin, piece.length)
                    target.narrow(0, piece.offset, piece.length).copy_(part, non_blocking=True)
        self._pairs.clear()


def _late_device(location: str) -> torch.device | None:
    """Return a location's device if its storages are filled later; else None."""
    try:
        device = torch.device(location)
    except RuntimeError:  # a tag of older files, or of torch.serialization.register_package
        return None
    return device if is_staged(device) else None


@dataclass(frozen=True)
class _Piece:
    """A range of a storage on a device, and the mapped storage that has its bytes.

    The reference keeps the file mapped while a thread reads.
    """

    storage: torch.UntypedStorage
    source: torch.UntypedStorage
    offset: int
    length: int


@dataclass(frozen=True)
class _Pieces:
    """Consecutive pieces that fit into one buffer."""

    pieces: Sequence[_Piece]

    def __len__(self) -> int:
        return sum(piece.length for piece in self.pieces)

    @property
    def begins(self) -> list[int]:
        """Offset of each piece in the buffer."""
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
