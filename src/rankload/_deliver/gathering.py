"""`delivery="gather"`, and the choice that ``"auto"`` makes: ranks share out the reading of what all of them want."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rankload._cache.linux import is_on_local_disk
from rankload._deliver.carrier import Plan
from rankload._deliver.choice import ON_THE_CPU, Choice, Facts, asked_for, choose
from rankload._deliver.files import CheckpointFiles
from rankload._deliver.independent import Reading
from rankload._deliver.places import is_replicated
from rankload._deliver.reading import ReportBytes, read_all
from rankload._deliver.saved import Assignment
from rankload._deliver.staging.sharers import Sharers
from rankload._deliver.staging.whole_tensors import is_good_as_it_is, upload_whole
from rankload._deliver.transfers import Transfer
from rankload._job.channel import RankChannel
from rankload._job.devices import hardware_id
from rankload._job.machine import kernel_id
from rankload._settings import Settings
from rankload._types import Progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_logger = logging.getLogger(__name__)


class Gathering(Reading):
    """Each rank reads its share of what all want, and its own parts of the rest; or everything, if they do not agree.

    Args:
        files: of the checkpoint.
        channel: of the call.
        group: over which the call is; None for the default one.
        settings: deadlines.
        is_asked_for: by the caller; else it is done where it pays.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        channel: RankChannel,
        group: ProcessGroup | None,
        settings: Settings,
        *,
        is_asked_for: bool,
    ) -> None:
        super().__init__(files, channel, settings)
        self._channel: RankChannel = channel
        self._group, self._is_asked_for = group, is_asked_for
        self._settings = settings
        self._shared: set[int] = set()

    def planned(self, plan: Plan) -> bool:
        """See `Carrier.planned`.

        Raises:
            ArgumentError: a gather is asked for and not possible.
        """
        super().planned(plan)
        device = _device(plan)
        if device.type == "cpu" and not self._is_asked_for:
            self.reason = ON_THE_CPU
            return False
        shared = [step for step in plan.steps if _is_shared(step, plan, device)]
        self._shared = {id(step.saved) for step in shared}
        facts = self._facts(plan, shared, device)
        choice = asked_for(facts) if self._is_asked_for else choose(facts)
        if choice.delivery == "gather" and not self._is_asked_for and self._has_company_on(device):
            choice = Choice("read", "another rank has the same device, which collectives do not bear")
        if choice.delivery == "gather":
            first = self._channel.first("gather/wanted", _digest(shared))
            if first != _digest(shared):
                choice = Choice("read", "another rank wants other tensors than this one")
        self.delivery, self.reason = choice.delivery, choice.reason
        return choice.delivery == "gather"

    def met(self, all_would_gather: bool) -> None:
        """See `Carrier.met`."""
        if self.delivery == "gather" and not all_would_gather:
            self.delivery, self.reason = "read", "another rank has other tensors, another device or another backend"
        self.may_share = self.delivery == "read"
        _logger.debug("rank %d: delivery=%r: %s", self._channel.identity.rank, self.delivery, self.reason)

    def move(self, transfers: Sequence[Transfer], report: ReportBytes) -> int:
        """See `Carrier.move`."""
        if self.delivery == "read":
            return super().move(transfers, report)
        identity = self._channel.identity
        shared = [transfer for transfer in transfers if id(transfer.saved) in self._shared]
        others = [transfer for transfer in transfers if id(transfer.saved) not in self._shared]
        done = 0
        if shared:
            watch = self._channel.watch_over(range(1, identity.world_size) if identity.rank == 0 else [0])
            group = self._group if self._group is not None else dist.group.WORLD
            assert group is not None
            done = upload_whole(
                shared,
                shared[0].destination.device,
                self._limits,
                lambda done: watch(Progress("loading", done)),
                Sharers.of(group, self._settings, lambda: self._channel.meet("ready to gather")),
            )
        return done + read_all(others, lambda more: report(done + more), self._limits)

    def _has_company_on(self, device: torch.device) -> bool:
        """Tell whether another rank has come with the same device."""
        hardware = hardware_id(device)
        if hardware is None:
            return False
        return self._channel.claim(f"gather/{kernel_id()}/{hardware}") != self._channel.identity.rank

    def _facts(self, plan: Plan, shared: Sequence[Assignment], device: torch.device) -> Facts:
        identity = self._channel.identity
        shared_bytes = sum(step.saved.shape.numel() * step.saved.dtype.itemsize for step in shared)
        return Facts(
            device.type,
            _backend(self._group, device.type),
            shared_bytes,
            sum(entry.length for entry in plan.entries) - shared_bytes,
            identity.is_on_one_node,
            is_on_local_disk(self.files.source(self.files.name).descriptor),
        )


def _device(plan: Plan) -> torch.device:
    """Return the device that most tensors of the module go to."""
    bytes_of: Counter[torch.device] = Counter()
    for step in plan.steps:
        bytes_of[_destination(step, plan)] += step.saved.shape.numel() * step.saved.dtype.itemsize
    return max(bytes_of, key=bytes_of.__getitem__, default=torch.device("cpu"))


def _destination(step: Assignment, plan: Plan) -> torch.device:
    return plan.device() if step.target.is_meta else step.target.device


def _is_shared(step: Assignment, plan: Plan, device: torch.device) -> bool:
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
