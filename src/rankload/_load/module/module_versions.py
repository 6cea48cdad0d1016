"""The ``_metadata`` of a state dict: versions of modules, and the modules whose tensors torch replaces."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

#: load_state_dict(assign=True) leaves this key in its state dict. If that state dict is saved and loaded again, torch
#: assigns again, whatever the argument (torch/nn/modules/module.py, load_state_dict).
_ASSIGN = "assign_to_params_buffers"


def assigned_modules(state_dict: Any) -> set[str]:
    """Return the names of the modules whose tensors torch replaces by those of the state dict."""
    metadata = getattr(state_dict, "_metadata", None)
    items = metadata.items() if isinstance(metadata, Mapping) else ()
    return {str(name) for name, versions in items if isinstance(versions, Mapping) and versions.get(_ASSIGN)}


def without_assignment(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict without the request to replace tensors, for a load that copies."""
    metadata = getattr(state_dict, "_metadata", None)
    if not assigned_modules(state_dict) or metadata is None:
        return state_dict
    result: Any = copy.copy(state_dict)
    result._metadata = copy.copy(metadata)
    for name, versions in metadata.items():
        if isinstance(versions, Mapping):
            result._metadata[name] = {key: value for key, value in versions.items() if key != _ASSIGN}
    return result  # type: ignore[no-any-return]
