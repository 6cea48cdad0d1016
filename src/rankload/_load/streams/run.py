"""Run the copies of a load from files on this node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from rankload._load.device.pinned import is_staged
from rankload._load.device.readers import Limits
from rankload._load.module.copies import TensorCopy
from rankload._load.streams.own_parts import is_of_long_runs, upload_parts
from rankload._load.streams.whole_tensors import is_of_whole, upload_whole

#: Receive the bytes done so far.
ReportBytes = Callable[[int], None]


def read_all(copies: Sequence[TensorCopy], report: ReportBytes, limits: Limits) -> int:
    """Make all copies, in the order of the file; return the bytes that were read.

    Args:
        copies: copies to any devices.
        report: called with the bytes done so far.
        limits: number of reader threads for accelerators, and their longest time without progress. This thread itself
            reads into the CPU's memory.
    """
    direct: list[TensorCopy] = []
    whole, parts = (defaultdict[torch.device, list[TensorCopy]](list) for _ in range(2))
    for copy in sorted(copies, key=lambda copy: copy.saved.position):
        device = copy.destination.device
        if is_staged(device) and is_of_whole(copy):
            whole[device].append(copy)
        elif is_of_long_runs(copy):
            parts[device].append(copy)
        else:
            direct.append(copy)
    done = 0
    for device, of_device in whole.items():
        done += upload_whole(of_device, device, limits, _after(done, report))
    for device, of_device in parts.items():
        done += upload_parts(of_device, device, limits, _after(done, report))
    for read in [copy.saved.reader(copy.destination, copy.region) for copy in direct]:
        report(done)
        done += read()
    return done


def _after(done: int, report: ReportBytes) -> ReportBytes:
    return lambda more: report(done + more)
