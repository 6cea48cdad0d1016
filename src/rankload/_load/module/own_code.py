"""Detect modules whose own code looks at the state dict during a load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

#: Code in these packages only compares names and shapes, and computes: lazy tensors suffice.
_KNOWN = ("torch.nn.", "torch.distributed.")


def looks_at_state_dict(module: nn.Module) -> bool:
    """Return whether a module has such code. It may check the types of values, so it needs torch.load's results."""
    return not all(map(_is_known, _functions(module)))


def _functions(module: nn.Module) -> Iterator[Any]:
    yield module.load_state_dict
    for part in module.modules():
        yield part._load_from_state_dict
        for hook in part._load_state_dict_pre_hooks.values():
            # torch wraps hooks; after a copy of the module, the wrapper looks like a function of torch
            yield hook.hook if isinstance(hook, _WrappedHook) else hook


def _is_known(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_KNOWN)
