"""The interface of a delivery strategy: how checkpoint bytes reach this rank's tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
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
    """The tensors that a rank wants from a checkpoint.

    Attributes:
        index: index of the checkpoint; None if torch.load loads all of it.
        steps: assignments to the module's tensors.
        others: tensors for the optimizer, each with the parameter that it is laid out like, or None.
        device: returns the device for tensors that are on the meta device now.
    """

    index: Index | None
    steps: Sequence[Assignment]
    others: Sequence[tuple[LazyTensor, torch.Tensor | None]]
    device: Callable[[], torch.device]

    @property
    def entries(self) -> list[TensorEntry]:
        """Entries of the wanted tensors that are in files."""
        wanted = [*(step.saved for step in self.steps), *(saved for saved, _ in self.others)]
        return [saved.in_file.entry for saved in wanted if saved.in_file is not None]

    @property
    def targets(self) -> list[tuple[LazyTensor, torch.Tensor]]:
        """The wanted tensors of which this rank may want a part, each with a tensor on the same mesh and device."""
        of_module = [(step.saved, step.target) for step in self.steps]
        return [*of_module, *((saved, like) for saved, like in self.others if like is not None)]

    @property
    def main_device(self) -> torch.device:
        """Device that most bytes go to."""
        bytes_of: Counter[torch.device] = Counter()
        for saved, target in self.targets:
            bytes_of[self.destination(target)] += saved.shape.numel() * saved.dtype.itemsize
        return max(bytes_of, key=bytes_of.__getitem__, default=torch.device("cpu"))

    def destination(self, target: torch.Tensor) -> torch.device:
        """Return the device that a tensor of the module will be on."""
        return self.device() if target.is_meta else target.device


class DeliveryStrategy(ABC):
    """One load, seen from one rank: first the files, then the plan, then the bytes.

    Attributes:
        files: files of the checkpoint, or the received parts of them.
        path: this rank's file; None on a receiving rank.
        may_share: whether tensors may be views of the files.
        delivery: name of the delivery: ``"read"``, ``"broadcast"`` or ``"gather"``.
        reason: why this delivery is used.
    """

    path: Path | None
    files: CheckpointFiles
    may_share: bool
    delivery: str
    reason = "it was asked for"

    @abstractmethod
    def prepare(self, plan: LoadPlan) -> None:
        """Prepare for a plan, before the ranks agree."""

    def on_agreement(self) -> None:  # noqa: B027 - most strategies have nothing to decide
        """Decide what depends on the other ranks' plans, after all ranks have prepared."""

    @abstractmethod
    def execute(self, copies: Sequence[TensorCopy], report: ReportBytes) -> int:
        """Move the bytes, after the ranks have agreed. Return the bytes that this rank read or took from a stream."""
