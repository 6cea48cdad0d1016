"""Agree with other ranks on what to read together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rankload._coordination.call_context import CallContext
    from rankload._coordination.channel import Channel


@dataclass(frozen=True)
class Sharers:
    """Ranks that may want the same bytes.

    Attributes:
        ranks: their global ranks, in ascending order.
        sizes: sizes of the process groups.
        groups: process groups of this rank: the one that they form, or those of a grid, the outermost dimension first.
    """

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    groups: tuple[ProcessGroup, ...] = field(compare=False)

    @classmethod
    def of(cls, *groups: ProcessGroup, ranks: Sequence[int] | None = None) -> Sharers:
        """Return the ranks of one process group, or the given ranks, which are those of a grid."""
        all_ranks = ranks if ranks is not None else dist.get_process_group_ranks(groups[0])
        return cls(tuple(sorted(all_ranks)), tuple(map(dist.get_world_size, groups)), groups)


@dataclass(frozen=True)
class Proposal:
    """This rank's proposal to read something together with others. It holds if all of them make the same one.

    Attributes:
        name: the same on all ranks that propose to read the same with the same ranks.
        sharers: those ranks.
    """

    name: str
    sharers: Sharers

    @classmethod
    def make(cls, channel: Channel, sharers: Sharers, device: torch.device, wanted: Any) -> Proposal:
        """Make a proposal. All ranks of the call have to meet before they look at it.

        Args:
            channel: channel of the call.
            sharers: the ranks.
            device: device of the tensors; on the others they must be on a device of the same type.
            wanted: JSON-able description of what to read, without anything that only this rank knows.
        """
        text = json.dumps([sharers.ranks, sharers.sizes, device.type, wanted])
        proposal = cls(f"gather/{hashlib.sha256(text.encode()).hexdigest()}", sharers)
        channel.count(proposal.name)
        return proposal

    def holds(self, channel: Channel) -> bool:
        """Return whether all ranks have made this proposal: the same on all of them."""
        return channel.count(self.name, 0) == len(self.sharers.ranks)


def group_for(call: CallContext, device: torch.device | None, why: str = "delivery='gather'") -> ProcessGroup:
    """Return the process group of a call, for tensors on a device.

    Args:
        call: context of the call.
        device: the device; None for any.
        why: what needs the group, for messages.

    Raises:
        ArgumentError: there is none, or it has no backend for the device.
    """
    group = call.group
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None or (device is not None and device.type not in device_types(group)):
        for_device = f" with a backend for the device {device.type!r}" if device is not None else ""
        raise ArgumentError(
            f"{why}: there is no process group{for_device}: call "
            "init_process_group with such a backend first ('nccl' or 'cpu:gloo,cuda:nccl' for cuda), or do "
            "without"
        )
    return group


def device_types(group: ProcessGroup) -> list[str]:
    """Return the types of devices for which a process group has a backend."""
    return [item.split(":")[0] for item in dist.get_backend_config(group).split(",")]
