"""Run the copies of a load from files of this node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from rankload._load.device.pinned import is_staged
from rankload._load.device.readers import Limits
from rankload._load.module.copies import TensorCopy
from rankload._load.streams.own_parts import is_of_long_runs, upload_parts
from rankload._load.streams.whole_tensors import is_of_whole, upload_whole

#: Called with the bytes that are done.
ReportBytes = Callable[[int], None]


def read_all(copies: Sequence[TensorCopy], report: ReportBytes, limits: Limits) -> int:
    """Read everything, in the order of the file; return the bytes that were read.

    Args:
        copies: into whatever device.
        report: called with the bytes that are done.
        limits: how many threads read for an accelerator (into the CPU's memory this one does), and how long a file may
            not answer them.
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
