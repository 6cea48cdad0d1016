"""The tensors of a broadcast, sent over the process group: the engine that the job trains with, such as NCCL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from rankload._coordination.call_context import CallContext
from rankload._formats.entry import TensorEntry
from rankload._load.delivery.strategy import LoadPlan
from rankload._load.device.readers import Limits
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.sharing.broadcast_group import BroadcastGroup
from rankload._load.sharing.proposal import device_types, group_for
from rankload._load.sharing.shared_reads import SharedRead, bucket_bytes, read_shared
from rankload._load.streams.assemble import TensorAssemblers
from rankload._load.streams.buckets import Range, cut
from rankload._load.streams.whole_tensors import WholeTensors
from rankload._settings import variable
from rankload._types import Progress
from rankload.errors import LoadError

_WHY = f"{variable('broadcast_over_group')}=1"


class GroupStream:
    """A broadcast over the process group, as one rank sees it. All ranks of the call take part.

    Args:
        source: rank of the source.
        call: context of the call.
    """

    def __init__(self, source: int, call: CallContext) -> None:
        self._source, self._call = source, call
        self._device = torch.device("cpu")

    def prepare(self, plan: LoadPlan) -> None:
        """Say on which kind of device the tensors of this rank will be. A rank that wants none goes by the others.

        Raises:
            ArgumentError: there is no process group with a backend for that device.
        """
        wants_any = bool(plan.targets)
        self._device = plan.main_device if wants_any else plan.device()
        group_for(self._call, self._device if wants_any else None, _WHY)
        if wants_any:
            self._call.channel.count(_key(self._device.type))

    def check_agreement(self) -> None:
        """Check that all ranks want the tensors on the same kind of device, after all have prepared.

        Raises:
            LoadError: they do not.
        """
        channel, types = self._call.channel, device_types(group_for(self._call, None, _WHY))
        wanted = [kind for kind in types if channel.count(_key(kind), 0)]
        if len(wanted) > 1:
            raise LoadError(
                f"{_WHY}: the ranks' modules are on different kinds of device; move all of them to the same kind, or "
                "unset the variable"
            )
        if self._device.type not in (wanted or types):
            self._device = torch.device((wanted or types)[0])

    def run(
        self,
        ranges: Mapping[str, Sequence[Range]],
        tensors: Collection[TensorEntry],
        copies: Sequence[TensorCopy],
        files: CheckpointFiles,
    ) -> int:
        """Make the copies out of the stream; return the bytes that this rank has read. Collective.

        Args:
            ranges: ranges to send, by file.
            tensors: all tensors in the ranges.
            copies: copies of this rank's parts of them.
            files: files of the checkpoint; only the source reads them.

        Raises:
            LoadError, CacheError: the source cannot read the files.
            RankLostError, ProgressTimeoutError: see `ExchangeGroup.end`.
        """
        channel, settings, rank = self._call.channel, self._call.settings, self._call.identity.rank
        buckets = cut(ranges, tensors, bucket_bytes(1))
        assemblers = TensorAssemblers(copies, buckets)
        group = BroadcastGroup.of(group_for(self._call, self._device, _WHY), self._source, settings)
        watch = channel.watch_over([self._source] if rank != self._source else self._others)

        def report(done: int) -> None:
            watch(Progress("loading", done))

        done = read_shared(
            [SharedRead([WholeTensors(bucket, files, assemblers) for bucket in buckets], group)],
            self._device,
            Limits.of(self._call.identity, settings),
            report,
            files.display_name,
            lambda: channel.meet("ready to broadcast"),
        )
        assemblers.check_empty()
        return done

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._call.identity.world_size) if rank != self._source]


def _key(device_type: str) -> str:
    return f"broadcast/device/{device_type}"
