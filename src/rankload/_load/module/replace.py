"""Replace a module's tensors: those on the meta device, and all with ``assign=True``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from rankload._load.module.copies import TensorCopy
from rankload._load.module.lazy_tensor import Assignment, MemoryTensor
from rankload._load.module.post_hooks import hooks_of_torch, run_hooks
from rankload._load.module.slots import (
    TensorSlot,
    as_parameter_like,
    empty_copy,
    is_distributed,
    own_part,
    tensor_slots,
)


class Replacer:
    """The replacement of a module's tensors, under all their names, so that tied tensors stay tied.

    Args:
        module: module without its wrappers.
        device: returns the device for tensors that are on the meta device now.
        may_share: whether a tensor on the CPU may be a view of the mapped file, if the dtypes are equal.

    Attributes:
        bytes_mapped: bytes of new tensors that are views of the mapped file.
    """

    def __init__(self, module: nn.Module, device: Callable[[], torch.device], *, may_share: bool) -> None:
        self._module, self._device, self._may_share = module, device, may_share
        self._replacements: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.bytes_mapped = 0

    def copy(self, step: Assignment) -> TensorCopy | None:
        """Make the tensor that replaces a step's target. Return the copy into it; None if it needs no copy."""
        target, saved = step.target, step.saved
        device = self._device() if target.is_meta else target.device
        dtype = saved.dtype if step.is_replaced else target.dtype
        if step.is_replaced and isinstance(saved, MemoryTensor) and device.type == "cpu":
            self._replacements.append((target, saved.exact()))  # keeps the tensor's class
            return None
        if self._may_share and device.type == "cpu" and dtype == saved.dtype and not is_distributed(target):
            tensor = saved.exact() if step.is_replaced else saved.view()
            self._replacements.append((target, tensor))
            self.bytes_mapped += saved.numel() * dtype.itemsize
            return None
        tensor = empty_copy(target, device, dtype)
        self._replacements.append((target, tensor))
        return TensorCopy(saved, *own_part(tensor))

    def finish(self) -> None:
        """Put the new tensors in their places, after all copies."""
        if not self._replacements:
            return
        by_tensor: dict[int, list[TensorSlot]] = defaultdict(list)
        for slot in tensor_slots(self._module):
            by_tensor[id(slot.tensor)].append(slot)
        for target, tensor in self._replacements:
            replacement = as_parameter_like(tensor, target)
            for slot in by_tensor[id(target)]:
                slot.replace(replacement)
        if any(is_distributed(tensor) for _, tensor in self._replacements):
            run_hooks(hooks_of_torch(self._module), [], [])  # FSDP registers its new parameters in a hook
