"""Carrying out transfers from files of this node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from rankload._load.device.pinned import is_staged
from rankload._load.device.readers import Limits
from rankload._load.module.copies import Transfer
from rankload._load.streams.own_parts import is_of_long_runs, upload_parts
from rankload._load.streams.whole_tensors import is_of_whole, upload_whole

#: Called with the bytes that are done.
ReportBytes = Callable[[int], None]


def read_all(transfers: Sequence[Transfer], report: ReportBytes, limits: Limits) -> int:
    """Read everything, in the order of the file; return the bytes that were read.

    Args:
        transfers: into whatever device.
        report: called with the bytes that are done.
        limits: how many threads read for an accelerator (into the CPU's memory this one does), and how long a file may
            not answer them.
    """
    direct: list[Transfer] = []
    whole, parts = (defaultdict[torch.device, list[Transfer]](list) for _ in range(2))
    for transfer in sorted(transfers, key=lambda transfer: transfer.saved.position):
        device = transfer.destination.device
        if is_staged(device) and is_of_whole(transfer):
            whole[device].append(transfer)
        elif is_of_long_runs(transfer):
            parts[device].append(transfer)
        else:
            direct.append(transfer)
    done = 0
    for device, of_device in whole.items():
        done += upload_whole(of_device, device, limits, _after(done, report))
    for device, of_device in parts.items():
        done += upload_parts(of_device, device, limits, _after(done, report))
    for read in [transfer.saved.reader(transfer.destination, transfer.box) for transfer in direct]:
        report(done)
        done += read()
    return done


def _after(done: int, report: ReportBytes) -> ReportBytes:
    return lambda more: report(done + more)
