"""Uninitialised lazy modules: undo the shapes that load_state_dict gives them if the load fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rankload._load.module.slots import tensor_slots


@contextmanager
def uninitialised_again_on_error(module: nn.Module) -> Iterator[None]:
    """Undo that where something does not fit, on this rank or another: nothing is written then."""
    lazy = [(slot.tensor, type(slot.tensor)) for slot in tensor_slots(module) if is_lazy(slot.tensor)]
    try:
        yield
    except BaseException:
        for tensor, kind in lazy:
            if not is_lazy(tensor):
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                tensor.__class__ = kind
        raise
