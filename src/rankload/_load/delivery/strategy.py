"""The interface of a delivery strategy: how checkpoint bytes reach this rank's tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rankload._formats.entry import TensorEntry
from rankload._formats.index import Index
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.module.lazy_tensor import Assignment, LazyTensor
from rankload._load.streams.run import ReportBytes


@dataclass(frozen=True)
class LoadPlan:
    """What a rank wants of a checkpoint.

    Attributes:
        index: the checkpoint's; None where torch.load loads all of it.
        steps: into the module.
        others: tensors for the optimizer.
        device: gives the device for what is on the meta device now.
    """

    index: Index | None
    steps: Sequence[Assignment]
    others: Sequence[LazyTensor]
    device: Callable[[], torch.device]

    @property
    def entries(self) -> list[TensorEntry]:
        """Return the tensors of files that it wants."""
        wanted = [*(step.saved for step in self.steps), *self.others]
        return [saved.in_file.entry for saved in wanted if saved.in_file is not None]


class DeliveryStrategy(ABC):
    """One load, seen from one rank: first the files, then the plan, then the bytes.

    Attributes:
        files: the checkpoint's, or what stands for them.
        path: the file that this rank has; None for one that receives.
        may_share: whether tensors may be views of the files.
        delivery: how the bytes come.
        reason: why so.
    """

    path: Path | None
    files: CheckpointFiles
    may_share: bool
    delivery: str
    reason = "it was asked for"

    @abstractmethod
    def prepare(self, plan: LoadPlan) -> bool:
        """Take note of what this rank wants, before the ranks meet; return whether it would gather."""

    def on_agreement(self, all_would_gather: bool) -> None:  # noqa: B027 - most strategies have nothing to decide
        """Take note of what the others have returned."""

    @abstractmethod
    def execute(self, copies: Sequence[TensorCopy], report: ReportBytes) -> int:
        """Move the bytes, after the ranks have met; return how many this rank has read, or taken out of a stream."""
