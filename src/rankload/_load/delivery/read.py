"""`delivery="read"`: each rank reads the file."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from rankload._coordination.call_context import CallContext
from rankload._load.delivery.strategy import DeliveryStrategy, LoadPlan
from rankload._load.device.readers import Limits
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.node.parts import all_files
from rankload._load.node.read_ahead import read_ahead
from rankload._load.streams.run import ReportBytes, read_all


class ReadDelivery(DeliveryStrategy):
    """Each rank reads its own tensors.

    Args:
        files: files of the checkpoint.
        call: context of the call.
        reason: see `DeliveryStrategy`.
    """

    def __init__(self, files: CheckpointFiles, call: CallContext, reason: str = DeliveryStrategy.reason) -> None:
        self.path, self.files, self.may_share = files.path, files, True
        self.delivery, self.reason = "read", reason
        self._call, self._limits = call, Limits.of(call.identity, call.settings)
        self._wanted_bytes = 0

    @override
    def prepare(self, plan: LoadPlan) -> None:
        self._wanted_bytes = sum(entry.length for entry in plan.entries)

    @override
    def execute(self, copies: Sequence[TensorCopy], report: ReportBytes) -> int:
        own = sum(copy.region.element_count for copy in copies)
        if 2 * own >= sum(copy.saved.shape.numel() for copy in copies):  # at least half of the tensors, not a shard
            paths = all_files(self.files.path)
            if 2 * self._wanted_bytes >= sum(path.stat().st_size for path in paths):  # at least half of the checkpoint
                read_ahead(paths, self._call.channel, self._limits.progress_seconds)
        return read_all(copies, report, self._limits)
