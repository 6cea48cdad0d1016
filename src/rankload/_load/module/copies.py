"""The copies of a load: which region of a saved tensor goes to which tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rankload._load.module.lazy_tensor import LazyTensor
from rankload._load.module.regions import Region


@dataclass(frozen=True, slots=True, eq=False)
class TensorCopy:
    """The copy of a saved tensor, or of a rank's part of one.

    Attributes:
        saved: tensor in the checkpoint.
        destination: tensor that gets the part, on any device and of any dtype.
        region: part of the saved tensor to copy.
    """

    saved: LazyTensor
    destination: torch.Tensor
    region: Region


@dataclass(frozen=True)
class Prepared:
    """A load that is ready to run.

    Attributes:
        copies: copies to make.
        bytes_mapped: bytes of tensors that need no copy, because they are views of the mapped file.
        finish: called after all copies.
    """

    copies: Sequence[TensorCopy]
    bytes_mapped: int
    finish: Callable[[], None]
