"""Record what load_state_dict copies into a module, instead of copying it.

load_state_dict handles names, hooks, module versions and extra state, but writes at once. Here it only shows what goes
where. The bytes are moved later, after all ranks have found that everything fits.
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
    """A mode that records copies into a module instead of making them. All other functions run normally.

    Args:
        own: tensors of the module; copies into these are recorded.
        saved: tensors of the checkpoint; copies of these are recorded.
        assignments: list that gets the recorded copies.
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
        """Record a copy, or call the function."""
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
