"""Record what load_state_dict copies into a module, instead of copying it.

load_state_dict knows names, hooks, module versions and extra state, and writes at once. Here it only says what goes
where; the bytes are moved afterwards, when all ranks have found that everything fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from rankload._load.module.lazy_tensor import Assignment, LazyTensor, MemoryTensor

_MODULE_LOAD: Any = torch.Tensor.module_load  # torch.__future__.set_swap_module_params_on_conversion


class NotedCopies(TorchFunctionMode):
    """Within, copies into a module are noted; everything else is done.

    Args:
        own: tensors of the module: whatever is copied into one of them is noted.
        saved: tensors of the checkpoint: noted, whatever they are copied into.
        assignments: where to note it.
    """

    def __init__(
        self, own: Iterable[torch.Tensor], saved: Iterable[torch.Tensor], assignments: list[Assignment]
    ) -> None:
        super().__init__()
        self._own, self._saved = {id(tensor) for tensor in own}, {id(tensor) for tensor in saved}
        self._assignments = assignments

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Note a copy, or call the function."""
        if (function is torch.Tensor.copy_ or function is _MODULE_LOAD) and len(arguments) > 1:
            target, source = arguments[:2]
            if isinstance(target, torch.Tensor) and self._is_noted(target, source):
                saved = source if isinstance(source, LazyTensor) else MemoryTensor(source, self._assignments)
                self._assignments.append(Assignment(target, saved))
                return target if function is torch.Tensor.copy_ else target.detach()
        return function(*arguments, **(keywords or {}))

    def _is_noted(self, target: torch.Tensor, source: Any) -> bool:
        if isinstance(source, LazyTensor):
            return True
        if source is target or is_lazy(target) or is_lazy(source) or not isinstance(source, torch.Tensor):
            return False  # torch copies nothing, or refuses
        return id(target) in self._own or id(source) in self._saved
