"""The copies that a load consists of: which region of which saved tensor goes where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rankload._load.module.lazy_tensor import LazyTensor
from rankload._load.module.regions import Region


@dataclass(frozen=True, slots=True, eq=False)
class TensorCopy:
    """One tensor, or a rank's part of it.

    Attributes:
        saved: it, in the checkpoint.
        destination: what is to hold the part: of any device and dtype.
        region: which part of the saved tensor.
    """

    saved: LazyTensor
    destination: torch.Tensor
    region: Region


@dataclass(frozen=True)
class Prepared:
    """A load that is ready to be carried out.

    Attributes:
        copies: what has to be moved.
        bytes_mapped: of tensors that need no copy, for they are views of the mapped file.
        finish: to be called when all is moved.
    """

    copies: Sequence[TensorCopy]
    bytes_mapped: int
    finish: Callable[[], None]
