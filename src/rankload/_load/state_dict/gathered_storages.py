"""`delivery="gather"` of a state dict: the ranks share the reading of storages that all of them put on accelerators."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rankload._coordination.call_context import CallContext
from rankload._load.device.readers import Limits
from rankload._load.sharing.gather_group import GatherGroup
from rankload._load.sharing.proposal import Proposal, Sharers, group_for
from rankload._load.sharing.shared_reads import SharedRead, bucket_bytes, read_shared
from rankload._load.state_dict.deferred_storages import DeferredStorages
from rankload._types import Progress

_logger = logging.getLogger("rankload")


def gather_storages(parts: Sequence[DeferredStorages], call: CallContext, limits: Limits, display_name: str) -> None:
    """Fill the empty storages of a state dict. Collective.

    All ranks of the call share the reading if they want the same storages on one accelerator each. Else each rank reads
    what it wants.

    Args:
        parts: empty storages, by file of the checkpoint.
        call: context of the call.
        limits: number of reader threads, and longest time without progress.
        display_name: name of the checkpoint, for messages.

    Raises:
        ArgumentError: there is no process group with a backend for the accelerator.
        RankLostError, ProgressTimeoutError: see `ExchangeGroup.end`.
    """
    devices = {device for part in parts for device in part.wanted}
    proposal = None
    if len(devices) == 1:
        (device,) = devices
        wanted = [part.wanted.get(device, []) for part in parts]
        proposal = Proposal.make(call.channel, Sharers.of(group_for(call, device)), device, wanted)
    call.channel.meet("storages are known")
    if proposal is None or not proposal.holds(call.channel):
        _logger.debug("rank %d: the ranks want storages on different devices; each reads its own", call.identity.rank)
        for part in parts:
            part.fill(limits, call.report_loading, display_name)
        return
    group = GatherGroup.of(proposal.sharers.groups, call.settings)
    size = bucket_bytes(group.count)
    read = SharedRead([bucket for part in parts for bucket in part.cut(device, size)], group)
    rank, world_size = call.identity.rank, call.identity.world_size
    watch = call.channel.watch_over(range(1, world_size) if rank == 0 else [0])

    def report(done: int) -> None:
        watch(Progress("loading", done))

    read_shared([read], device, limits, report, display_name, lambda: call.channel.meet("ready to gather"))
