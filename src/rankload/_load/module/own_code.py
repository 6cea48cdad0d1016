"""Detect modules with code of their own that looks at the state dict during a load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

#: What is defined there compares names and shapes, and computes: stand-ins for tensors will do.
_KNOWN = ("torch.nn.", "torch.distributed.")


def looks_at_state_dict(module: nn.Module) -> bool:
    """Return whether there is such code: it may ask a value for its type, and must find what torch.load returns."""
    return not all(map(_is_known, _functions(module)))


def _functions(module: nn.Module) -> Iterator[Any]:
    yield module.load_state_dict
    for part in module.modules():
        yield part._load_from_state_dict
        for hook in part._load_state_dict_pre_hooks.values():
            # torch wraps hooks; the wrapper of a copied module looks like a function of torch's
            yield hook.hook if isinstance(hook, _WrappedHook) else hook


def _is_known(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_KNOWN)
