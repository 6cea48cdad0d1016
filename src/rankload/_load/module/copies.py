"""What has to be moved: parts of saved tensors, and where to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rankload._load.module.lazy_tensor import SavedTensor
from rankload._load.module.regions import Box


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """One tensor, or a rank's part of it.

    Attributes:
        saved: it, in the checkpoint.
        destination: what is to hold the part: of any device and dtype.
        box: which part of the saved tensor.
    """

    saved: SavedTensor
    destination: torch.Tensor
    box: Box


@dataclass(frozen=True)
class Prepared:
    """A load that is ready to be carried out.

    Attributes:
        transfers: what has to be moved.
        bytes_mapped: of tensors that need no transfer, for they are views of the mapped file.
        finish: to be called when all is moved.
    """

    transfers: Sequence[Transfer]
    bytes_mapped: int
    finish: Callable[[], None]
