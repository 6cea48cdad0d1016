"""`delivery="gather"`: ranks share the reading of the tensors that all of them want."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from typing_extensions import override

from rankload._coordination.call_context import CallContext
from rankload._load.delivery.read import ReadDelivery
from rankload._load.delivery.strategy import LoadPlan
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.module.lazy_tensor import Assignment
from rankload._load.module.slots import is_replicated
from rankload._load.streams.gather_group import GatherGroup
from rankload._load.streams.run import ReportBytes, read_all
from rankload._load.streams.whole_tensors import is_good_as_it_is, upload_whole
from rankload._types import Progress
from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_logger = logging.getLogger("rankload")


class GatherDelivery(ReadDelivery):
    """Each rank reads its share of the common tensors, and its own parts of the others.

    If the ranks want different tensors, each rank reads everything it needs.

    Args:
        files: files of the checkpoint.
        call: context of the call.
    """

    def __init__(self, files: CheckpointFiles, call: CallContext) -> None:
        super().__init__(files, call)
        self._shared: set[int] = set()

    @override
    def prepare(self, plan: LoadPlan) -> bool:
        """Compare the wanted tensors with the other ranks'; return whether this rank would gather.

        Raises:
            ArgumentError: the process group has no backend for the module's device.
        """
        super().prepare(plan)
        device = _device(plan)
        if _backend(self._call.group, device.type) is None:
            raise ArgumentError(
                "delivery='gather': there is no process group with a backend for the module's device "
                f"{device.type!r}: call init_process_group with such a backend first ('nccl' or 'cpu:gloo,cuda:nccl' "
                "for cuda), or pass delivery='auto'"
            )
        shared = [step for step in plan.steps if _is_shared(step, plan, device)]
        self._shared = {id(step.saved) for step in shared}
        if self._call.channel.first("gather/wanted", _digest(shared)) != _digest(shared):
            self.reason = "another rank wants other tensors than this one"
            return False
        self.delivery = "gather"
        return True

    @override
    def on_agreement(self, all_would_gather: bool) -> None:
        if self.delivery == "gather" and not all_would_gather:
            self.delivery, self.reason = "read", "another rank has other tensors, another device or another backend"
        self.may_share = self.delivery == "read"
        _logger.debug("rank %d: delivery=%r: %s", self._call.identity.rank, self.delivery, self.reason)

    @override
    def execute(self, copies: Sequence[TensorCopy], report: ReportBytes) -> int:
        if self.delivery == "read":
            return super().execute(copies, report)
        identity = self._call.identity
        shared = [copy for copy in copies if id(copy.saved) in self._shared]
        others = [copy for copy in copies if id(copy.saved) not in self._shared]
        done = 0
        if shared:
            watch = self._call.channel.watch_over(range(1, identity.world_size) if identity.rank == 0 else [0])
            group = self._call.group if self._call.group is not None else dist.group.WORLD
            assert group is not None
            done = upload_whole(
                shared,
                shared[0].destination.device,
                self._limits,
                lambda done: watch(Progress("loading", done)),
                GatherGroup.of(group, self._call.settings, lambda: self._call.channel.meet("ready to gather")),
            )
        return done + read_all(others, lambda more: report(done + more), self._limits)


def _device(plan: LoadPlan) -> torch.device:
    """Return the device that most bytes of the module go to."""
    bytes_of: Counter[torch.device] = Counter()
    for step in plan.steps:
        bytes_of[_destination(step, plan)] += step.saved.shape.numel() * step.saved.dtype.itemsize
    return max(bytes_of, key=bytes_of.__getitem__, default=torch.device("cpu"))


def _destination(step: Assignment, plan: LoadPlan) -> torch.device:
    return plan.device() if step.target.is_meta else step.target.device


def _is_shared(step: Assignment, plan: LoadPlan, device: torch.device) -> bool:
    saved = step.saved.in_file
    is_here = saved is not None and is_good_as_it_is(saved)
    return is_here and is_replicated(step.target) and _destination(step, plan) == device


def _digest(steps: Sequence[Assignment]) -> str:
    wanted: list[Any] = []
    for step in steps:
        assert step.saved.in_file is not None
        entry = step.saved.in_file.entry
        wanted.append((entry.file, entry.offset, entry.length))
    return hashlib.sha256(json.dumps(sorted(wanted)).encode()).hexdigest()


def _backend(group: ProcessGroup | None, device_type: str) -> str | None:
    if not dist.is_available() or not dist.is_initialized():
        return None
    backends = dict(item.split(":") for item in dist.get_backend_config(group).split(","))
    return backends.get(device_type)
