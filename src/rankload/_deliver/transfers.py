"""What has to be moved: parts of saved tensors, and where to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rankload._deliver.boxes import Box
from rankload._deliver.saved import SavedTensor

#: Called with the bytes that are done.
ReportBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """One tensor, or a rank's part of it.

    Attributes:
        saved: it, in the checkpoint.
        destination: what is to hold the part: of any device and dtype.
        box: which part of the saved tensor.
    """

    saved: SavedTensor
    destination: torch.Tensor
    box: Box


@dataclass(frozen=True)
class Prepared:
    """A load that is ready to be carried out.

    Attributes:
        transfers: what has to be moved.
        bytes_mapped: of tensors that need no transfer, for they are views of the mapped file.
        finish: to be called when all is moved.
    """

    transfers: Sequence[Transfer]
    bytes_mapped: int
    finish: Callable[[], None]


def read_all(transfers: Sequence[Transfer], report: ReportBytes) -> int:
    """Read everything, in the order of the file; return the bytes that were read."""
    bytes_read = 0
    for transfer in sorted(transfers, key=lambda transfer: transfer.saved.position):
        report(bytes_read)
        bytes_read += transfer.saved.read_into(transfer.destination, transfer.box)
    return bytes_read
