"""Uninitialised lazy modules: if a load fails, undo the shapes that load_state_dict gave them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rankload._load.module.slots import tensor_slots


@contextmanager
def uninitialised_again_on_error(module: nn.Module) -> Iterator[None]:
    """Make lazy parameters uninitialised again if the load fails on any rank: a failed load must change nothing."""
    lazy = [(slot.tensor, type(slot.tensor)) for slot in tensor_slots(module) if is_lazy(slot.tensor)]
    try:
        yield
    except BaseException:
        for tensor, kind in lazy:
            if not is_lazy(tensor):
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                tensor.__class__ = kind
        raise
