"""`delivery="gather"` of a state dict: the ranks share the reading of storages that all of them put on accelerators."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from rankload._coordination.call_context import CallContext
from rankload._load.device.readers import Limits
from rankload._load.sharing.exchange_group import ExchangeGroup
from rankload._load.sharing.gather_group import GatherGroup
from rankload._load.sharing.proposal import Proposal, Sharers, group_for
from rankload._load.sharing.shared_reads import SharedBucket, SharedRead, bucket_bytes, read_shared
from rankload._load.state_dict.deferred_storages import DeferredStorages
from rankload._types import Progress

_logger = logging.getLogger("rankload")


def gather_storages(call: CallContext, parts: Sequence[DeferredStorages], limits: Limits, display_name: str) -> None:
    """Fill the empty storages of a state dict. Collective.

    All ranks of the call share the reading if they want the same storages on one accelerator each. Else each rank reads
    what it wants.

    Args:
        call: context of the call.
        parts: empty storages, by file of the checkpoint.
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
    buckets = [bucket for part in parts for bucket in part.cut(device, bucket_bytes(group.count))]
    read_together(buckets, group, device, call, limits, display_name)


def read_together(
    buckets: Sequence[SharedBucket],
    sharers: ExchangeGroup,
    device: torch.device,
    call: CallContext,
    limits: Limits,
    display_name: str,
) -> None:
    """Read buckets that all ranks of a call want. Collective.

    Args:
        buckets: the same on all ranks.
        sharers: all ranks of the call.
        device: this rank's device for the buckets.
        call: context of the call.
        limits: number of reader threads, and longest time without progress.
        display_name: name of the checkpoint, for messages.

    Raises:
        RankLostError, ProgressTimeoutError: see `ExchangeGroup.end`.
    """
    rank, world_size = call.identity.rank, call.identity.world_size
    watch = call.channel.watch_over(range(1, world_size) if rank == 0 else [0])

    def report(done: int) -> None:
        watch(Progress("loading", done))

    read = SharedRead(buckets, sharers)
    read_shared([read], device, limits, report, display_name, lambda: call.channel.meet("ready to exchange"))
