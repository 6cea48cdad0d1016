"""Fill storages on accelerators after torch.load has made the tensors, with several reader threads.

torch.load itself copies each storage out of the mapped file, which is pageable memory, at the speed of one core.
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankload._load.device.map_location import goes_by_tags, location_of, restore_of
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
        self._pairs: dict[torch.device, list[_Pair]] = defaultdict(list)
        self._number = 0

    def __call__(self, storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        """Return a storage on its device, empty if that is an accelerator; see `Restore`."""
        device = self._late_device(tag)
        self._number += 1
        if device is None:
            return self._restore(storage, tag)
        empty = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        self._pairs[empty.device].append(_Pair(empty, storage, self._number))
        return empty

    @property
    def wanted(self) -> dict[torch.device, list[tuple[int, int]]]:
        """Number and size in bytes of each empty storage, by device. Ranks that load one file agree on the numbers."""
        return {device: [(pair.number, pair.full.nbytes()) for pair in pairs] for device, pairs in self._pairs.items()}

    def cut(self, device: torch.device, size: int) -> list[StoragePieces]:
        """Return the pieces of a device's storages, in groups of at most ``size`` bytes."""
        return list(_groups(self._pairs[device], size))

    def fill(self, limits: Limits, check_cancelled: Callable[[], None], display_name: str) -> None:
        """Fill the empty storages.

        Args:
            limits: number of reader threads, and longest time without progress.
            check_cancelled: called repeatedly during the wait for a file; an error that it raises ends the wait.
            display_name: name of the checkpoint, for messages.
        """
        for device, pairs in self._pairs.items():
            jobs = _groups(pairs, BUFFER_BYTES)
            for job, content in staged(jobs, device, limits, check_cancelled, display_name):
                job.finish(content)
        self._pairs.clear()


def accelerator_for(map_location: Any, tags: Iterable[str]) -> torch.device | None:
    """Return the accelerator on which all storages are filled later; None if some are not, or on another one.

    Args:
        map_location: any form that torch.load takes, already resolved for this rank.
        tags: location tags of all storages.
    """
    if not goes_by_tags(map_location):
        return None
    devices = {_late_device(location_of(map_location, tag)) for tag in tags}
    return devices.pop() if len(devices) == 1 else None


def _late_device(location: str) -> torch.device | None:
    """Return a location's device if its storages are filled later; else None."""
    try:
        device = torch.device(location)
    except RuntimeError:  # a tag of older files, or of torch.serialization.register_package
        return None
    return device if is_staged(device) else None


@dataclass(frozen=True)
class _Pair:
    """An empty storage on a device, the mapped storage that has its bytes, and its number in the file."""

    empty: torch.UntypedStorage
    full: torch.UntypedStorage
    number: int


@dataclass(frozen=True)
class _Piece:
    """A range of a storage.

    The reference to the mapped storage keeps the file mapped while a thread reads.

    Attributes:
        pair: the storage.
        offset: offset of the first byte in the storage.
        length: number of bytes.
        begin: offset of the first byte in the group.
    """

    pair: _Pair
    offset: int
    length: int
    begin: int


@dataclass(frozen=True)
class StoragePieces:
    """Consecutive pieces of storages: what fits into one buffer (`Job`), or into one bucket (`SharedBucket`)."""

    pieces: Sequence[_Piece]

    def __len__(self) -> int:
        return sum(piece.length for piece in self.pieces)

    def fill(self, address: int) -> None:
        """Copy all bytes to an address in memory."""
        self.read(address, 0, len(self))

    def read(self, address: int, begin: int, end: int) -> int:
        """Copy bytes ``begin`` to ``end`` to an address in memory; return their number."""
        for piece in self.pieces:
            first, last = max(begin, piece.begin), min(end, piece.begin + piece.length)
            if first < last:
                source = piece.pair.full.data_ptr() + piece.offset + first - piece.begin
                ctypes.memmove(address + first - begin, source, last - first)
        return end - begin

    def finish(self, content: torch.Tensor) -> None:
        """Copy bytes to the device: all of the pieces', ``uint8[n]``."""
        for piece in self.pieces:
            empty = piece.pair.empty
            target = torch.empty(0, dtype=torch.uint8, device=empty.device).set_(empty)
            part = content.narrow(0, piece.begin, piece.length)
            target.narrow(0, piece.offset, piece.length).copy_(part, non_blocking=True)


def _groups(pairs: Sequence[_Pair], size: int) -> Iterator[StoragePieces]:
    pieces: list[_Piece] = []
    room = size
    for pair in pairs:
        done = 0
        while done < pair.full.nbytes():
            length = min(room, pair.full.nbytes() - done)
            pieces.append(_Piece(pair, done, length, size - room))
            done, room = done + length, room - length
            if not room:
                yield StoragePieces(pieces)
                pieces, room = [], size
    if pieces:
        yield StoragePieces(pieces)
