"""Run load_state_dict post hooks after the bytes have arrived.

torch's own hooks (FSDP's) only register new parameters: they may run at any time, and more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys


@dataclass(frozen=True)
class PostHook:
    """A post hook.

    Attributes:
        module: module that the hook was registered for.
        function: the hook.
    """

    module: nn.Module
    function: Callable[[nn.Module, Any], object]

    @property
    def is_of_torch(self) -> bool:
        """Whether the hook is torch's own, which only does bookkeeping."""
        return str(getattr(self.function, "__module__", "")).startswith("torch.")


def run_hooks(hooks: Sequence[PostHook], missing_keys: list[str], unexpected_keys: list[str]) -> None:
    """Run hooks as load_state_dict does; they may change the lists."""
    keys = _IncompatibleKeys(missing_keys, unexpected_keys)
    for hook in hooks:
        hook.function(hook.module, keys)


def hooks_of_torch(module: nn.Module) -> list[PostHook]:
    """Return torch's own hooks, in the order in which load_state_dict runs them."""
    return [hook for hook in _hooks(module) if hook.is_of_torch]


@contextmanager
def postponed(module: nn.Module) -> Iterator[list[PostHook]]:
    """Make load_state_dict run only torch's own hooks. Yield the other hooks, in the order of load_state_dict."""
    hooks = [hook for hook in _hooks(module) if not hook.is_of_torch]
    registered = [
        (part._load_state_dict_post_hooks, dict(part._load_state_dict_post_hooks))
        for part in {id(hook.module): hook.module for hook in hooks}.values()
    ]
    try:
        for table, all_of_them in registered:
            table.clear()
            table.update((key, hook) for key, hook in all_of_them.items() if PostHook(module, hook).is_of_torch)
        yield hooks
    finally:
        for table, all_of_them in registered:
            table.clear()
            table.update(all_of_them)


def _hooks(module: nn.Module) -> Iterator[PostHook]:
    for child in module._modules.values():
        if child is not None:
            yield from _hooks(child)
    for function in module._load_state_dict_post_hooks.values():
        yield PostHook(module, function)
