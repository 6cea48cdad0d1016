"""Put other tensors in the places of a module's: for what is on the meta device, and for ``assign=True``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from rankload._deliver.places import Place, as_parameter_like, empty_copy, is_distributed, own_part, places
from rankload._deliver.saved import Assignment


class Replacer:
    """Replaces tensors of one module under all their names, so that tied ones stay tied.

    Args:
        module: without its wrappers.
        device: gives the device for what is on the meta device now.
        takes_saved_dtype: the checkpoint's dtype, as ``load_state_dict(assign=True)`` does; else the module's stays.
        may_share: on the CPU a tensor may be a view of the mapped file, if the dtype allows it.
    """

    def __init__(
        self, module: nn.Module, device: Callable[[], torch.device], *, takes_saved_dtype: bool, may_share: bool
    ) -> None:
        self._module, self._device = module, device
        self._takes_saved_dtype, self._may_share = takes_saved_dtype, may_share
        self._has_replaced_shards = False
        self._places: dict[int, list[Place]] = defaultdict(list)
        for place in places(module):
            self._places[id(place.tensor)].append(place)

    def replace(self, step: Assignment) -> int:
        """Put what was saved in the place of the target; return the bytes that were read."""
        target, saved = step.target, step.saved
        device = self._device() if target.is_meta else target.device
        dtype = saved.dtype if self._takes_saved_dtype else target.dtype
        if self._may_share and device.type == "cpu" and dtype == saved.dtype and not is_distributed(target):
            tensor = saved.view()
            bytes_read = tensor.numel() * tensor.element_size()
        else:
            tensor = empty_copy(target, device, dtype)
            bytes_read = saved.read_into(*own_part(tensor))
        tensor = as_parameter_like(tensor, target)
        for place in self._places[id(target)]:
            place.put(tensor)
        self._has_replaced_shards |= is_distributed(tensor)
        return bytes_read

    def finish(self) -> None:
        """Let FSDP take notice of new parameters: it does in its hook behind load_state_dict."""
        if self._has_replaced_shards:
            self._module.load_state_dict({}, strict=False)
