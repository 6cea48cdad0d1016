"""`delivery="gather"`: ranks that want the same bytes share the reading, and exchange what they have read."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from rankload._coordination.call_context import CallContext
from rankload._load.delivery.read import ReadDelivery
from rankload._load.delivery.strategy import LoadPlan
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.module.guesses import Guesses
from rankload._load.module.slots import own_part
from rankload._load.sharing.gather_group import GatherGroup
from rankload._load.sharing.proposal import Proposal, Sharers, group_for
from rankload._load.sharing.shared_reads import SharedRead, bucket_bytes, read_shared
from rankload._load.streams.packed_parts import PartKey, is_packable, pack, part_key
from rankload._load.streams.run import ReportBytes, read_all
from rankload._load.streams.whole_tensors import cut_whole, is_of_whole
from rankload._types import Progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_logger = logging.getLogger("rankload")


class GatherDelivery(ReadDelivery):
    """Each rank reads its share of what others want, too, and everything that nobody else wants.

    Each rank proposes to read parts together with the ranks that should hold the same ones. What all of these ranks
    have proposed is read together.

    Args:
        files: files of the checkpoint.
        call: context of the call.
    """

    def __init__(self, files: CheckpointFiles, call: CallContext) -> None:
        super().__init__(files, call)
        self._device = torch.device("cpu")
        self._proposals: list[tuple[Sequence[PartKey], Sequence[Proposal]]] = []
        self._accepted: list[tuple[Sequence[PartKey], Proposal]] = []

    @override
    def prepare(self, plan: LoadPlan) -> None:
        """Propose to share.

        Raises:
            ArgumentError: the process group has no backend for the module's device.
        """
        super().prepare(plan)
        channel, self._device = self._call.channel, plan.main_device
        everyone = group_for(self._call, self._device)
        self._proposals = [
            (parts, [Proposal.make(channel, sharers, self._device, sorted(parts)) for sharers in guesses])
            for guesses, parts in _parts(plan, everyone, self._device).items()
        ]

    @override
    def on_agreement(self) -> None:
        """Accept, for each set of parts, the proposal that holds for the most ranks."""
        for parts, proposals in self._proposals:
            proposal = next((proposal for proposal in proposals if proposal.holds(self._call.channel)), None)
            if proposal is not None:
                self._accepted.append((parts, proposal))
        # all ranks need the same order, or they would wait for one another in a circle
        self._accepted.sort(key=lambda accepted: (accepted[1].sharers.ranks, accepted[1].name))
        if self._accepted:
            self.delivery, self.may_share = "gather", False
        else:
            self.reason = "another rank wants other tensors than this one, or on another kind of device"
            if not self._proposals:
                self.reason = "no other rank holds the same parts as this one"
        _logger.debug("rank %d: delivery=%r: %s", self._call.identity.rank, self.delivery, self.reason)

    @override
    def execute(self, copies: Sequence[TensorCopy], report: ReportBytes) -> int:
        by_part: dict[PartKey, list[TensorCopy]] = defaultdict(list)
        for copy in copies:
            if copy.saved.in_file is not None:
                by_part[part_key(copy.saved.in_file, copy.region)].append(copy)
        reads = [self._shared_read({part: by_part[part] for part in parts}, made) for parts, made in self._accepted]
        meet = functools.partial(self._call.channel.meet, "ready to gather")
        if not reads:
            meet()
            return super().execute(copies, report)
        rank, world_size = self._call.identity.rank, self._call.identity.world_size
        watch = self._call.channel.watch_over(range(1, world_size) if rank == 0 else [0])

        def report_gathered(done: int) -> None:
            watch(Progress("loading", done))

        done = read_shared(reads, self._device, self._limits, report_gathered, self.files.display_name, meet)
        shared = {id(copy) for parts, _ in self._accepted for part in parts for copy in by_part[part]}
        others = [copy for copy in copies if id(copy) not in shared]
        return done + read_all(others, lambda more: report(done + more), self._limits)

    def _shared_read(self, parts: Mapping[PartKey, Sequence[TensorCopy]], proposal: Proposal) -> SharedRead:
        group = GatherGroup.of(proposal.sharers.groups, self._call.settings)
        copies = [copy for of_part in parts.values() for copy in of_part]
        are_whole, size = all(map(is_of_whole, copies)), bucket_bytes(group.count)
        return SharedRead(cut_whole(copies, size) if are_whole else pack(parts, size), group)


def _parts(plan: LoadPlan, everyone: ProcessGroup, device: torch.device) -> dict[tuple[Sharers, ...], list[PartKey]]:
    """Return the parts that this rank may share, by the guesses with whom."""
    guesses = Guesses(everyone)
    found: dict[PartKey, tuple[Sharers, ...]] = {}
    for saved, target in plan.targets:
        sharers = guesses.of(target)
        if saved.in_file is not None and sharers and plan.destination(target) == device:
            _, region = own_part(target)
            if is_packable(saved.in_file, region):
                found.setdefault(part_key(saved.in_file, region), sharers)
    parts: dict[tuple[Sharers, ...], list[PartKey]] = defaultdict(list)
    for part, sharers in found.items():
        parts[sharers].append(part)
    return parts
