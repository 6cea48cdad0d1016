"""Replace functions wherever a module has bound them, as ``from torch.hub import load_state_dict_from_url`` does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


def rebind(pairs: Iterable[tuple[Function, Function]]) -> list[str]:
    """Replace functions in all imported modules, by identity, also inside a functools.partial.

    Modules that are imported later get what their import finds: after a is replaced by b, that is b. So replacing b by
    a undoes it everywhere.

    Args:
        pairs: functions, each with what takes its place.

    Returns:
        The names of the bindings that were replaced, ``module.name``, sorted.
    """
    others = {id(function): (function, other) for function, other in pairs}
    found = []
    for module_name, module in [*sys.modules.items()]:
        if not isinstance(module, ModuleType) or module_name.partition(".")[0] == "rankload":
            continue
        for name, value in [*vars(module).items()]:
            is_partial = type(value) is functools.partial
            function, other = others.get(id(value.func if is_partial else value), (None, None))
            if function is None:
                continue
            if is_partial:
                value.__setstate__((other, value.args, value.keywords, vars(value) or None))
            else:
                setattr(module, name, other)
            found.append(f"{module_name}.{name}")
    return sorted(found)
