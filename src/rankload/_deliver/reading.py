"""Carrying out transfers from files of this node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rankload._deliver.transfers import Transfer
from rankload._deliver.upload import Uploader

#: Called with the bytes that are done.
ReportBytes = Callable[[int], None]


def read_all(transfers: Sequence[Transfer], report: ReportBytes) -> int:
    """Read everything, in the order of the file; return the bytes that were read."""
    uploaders: dict[torch.device, Uploader] = {}
    bytes_read = 0
    for transfer in sorted(transfers, key=lambda transfer: transfer.saved.position):
        report(bytes_read)
        if Uploader.takes(transfer):
            device = transfer.destination.device
            if device not in uploaders:
                uploaders[device] = Uploader(device)
            bytes_read += uploaders[device].upload(transfer)
        else:
            bytes_read += transfer.saved.read_into(transfer.destination, transfer.box)
    for uploader in uploaders.values():
        uploader.finish()
    return bytes_read
